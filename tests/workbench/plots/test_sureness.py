"""Plots of an ensemble: what is drawn is what its tables say."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from kcwb import plots
from kcwb.errors import SettingError
from kcwb.models.graph import Graph
from kcwb.workbench.plots.sureness import inclusion_by_layer, plot_confidence, plot_inclusion, plot_sources
from tests.workbench.ensembles import KEPT, TWINS, ensemble_of
from tests.workbench.plots.test_charts import _calm, drawn  # noqa: F401


def curve_table() -> pd.DataFrame:
    rows = []
    for confidence, edges in ((0.1, 300), (0.5, 80), (1.0, 0)):
        for split in ("D_val, cross-fitted", "D_test"):
            for run, hit in (("consensus", 1 - confidence / 2), ("random circuits", 0.0)):
                rows.append((confidence, split, run, edges, 8, hit, hit - 0.1, hit + 0.1, 2 + confidence))
    names = ["confidence", "split", "run", "edges", "n", "hit", "low", "high", "nll"]
    return pd.DataFrame(rows, columns=names)


def test_the_confidence_curve_has_hits_losses_and_sizes_beside_random_circuits() -> None:
    figure = drawn(plot_confidence(curve_table().assign(k=3), title="$x$"))
    hits, losses, sizes = figure.axes
    assert hits.get_ylabel() == "Hit@3, with its 95% interval"
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 2]
    assert hits.lines[0].get_xdata().tolist() == [0.1, 0.5, 1.0]
    assert hits.lines[0].get_ydata().tolist() == pytest.approx([0.95, 0.75, 0.5])
    band = hits.collections[0].get_paths()[0].vertices
    assert {(0.1, 0.85), (0.1, 1.05)} <= {(round(x, 3), round(y, 3)) for x, y in band.tolist()}
    assert losses.lines[2].get_ydata().tolist() == pytest.approx([2.1, 2.5, 3.0])
    assert sizes.lines[0].get_ydata().tolist() == [300, 80, 0] and sizes.get_yscale() == "symlog"
    assert len({line.get_linestyle() for line in hits.lines}) == 2
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["consensus", "random circuits", "D_val, cross-fitted", "D_test"]


def test_a_table_that_is_no_confidence_curve_is_refused() -> None:
    with pytest.raises(SettingError, match="nll"):
        plot_confidence(curve_table().drop(columns="nll"))
    with pytest.raises(SettingError, match="empty"):
        plot_confidence(curve_table().head(0))


def test_the_map_by_layer_has_sums_and_means_of_the_inclusion_probabilities() -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    sums, means = inclusion_by_layer(ensemble)
    assert list(sums.index) == ["input", "0", "1"] and list(sums.columns) == ["0", "1", "logits"]
    # from input: a0.h1 always, m1 once in four; from layer 0: a1.h0 in three of four; from layer 1: a1.h0 and m1
    expected = [[1, 0.25, np.nan], [np.nan, 0.75, np.nan], [np.nan, np.nan, 1.25]]
    np.testing.assert_allclose(sums.to_numpy(), expected)
    expected[2][2] = 0.625
    np.testing.assert_allclose(means.to_numpy(), expected)
    assert math.isclose(float(np.nansum(sums)), ensemble.size)
    figure = drawn(plot_inclusion(ensemble, title="$x$"))
    left, right = (axes.collections[0].get_array().filled(np.nan) for axes in figure.axes[:2])
    np.testing.assert_allclose(left, sums.to_numpy()[::-1])
    np.testing.assert_allclose(right, means.to_numpy()[::-1])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "0", "input"]


def test_an_ensemble_of_empty_draws_has_a_map() -> None:
    drawn(plot_inclusion(ensemble_of({"input->m0": "00", "m0->logits": "00"})))
    drawn(plot_inclusion(ensemble_of({"input->m0": "11", "m0->logits": "11"}, graph=Graph(n_layers=1, n_heads=1))))


def test_bars_of_sources_are_their_indices() -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    figure = drawn(plot_sources(ensemble))
    (axes,) = figure.axes
    table = ensemble.sources.iloc[:2]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([*table["alone"], *table["total"]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["facts", "setting"]
    with pytest.raises(SettingError, match="no twins"):
        plot_sources(ensemble_of(KEPT))


def test_names_of_sources_are_drawn_as_they_are() -> None:
    rows = dict.fromkeys(KEPT, "0000")
    figure = drawn(plot_sources(ensemble_of(KEPT, {"$a$": rows, "<b>\n": rows})))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r"\$a\$", r"<b>\n"]


def test_they_are_among_the_plots_of_the_package() -> None:
    assert plots.plot_confidence is plot_confidence and plots.plot_sources is plot_sources
    assert plots.plot_inclusion is plot_inclusion
