"""Pictures of a judgement show what its tables hold, and the sentences under them say it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from kcwb import plots
from kcwb.errors import SettingError
from kcwb.workbench.plots.referee import (
    matrix_sentence,
    minimality_sentence,
    plot_matrix,
    plot_minimality,
    plot_rivals,
    rivals_sentence,
)
from tests.hostile import HOSTILE
from tests.workbench.judgements import KINDS, judgement_of, matrix
from tests.workbench.plots.test_charts import _calm, drawn  # noqa: F401


def cells(axes) -> list[list[float]]:
    return axes.collections[0].get_array().filled(np.nan).tolist()


def test_the_matrix_has_a_pane_for_each_level_with_its_numbers_written_in_cells() -> None:
    figure = drawn(plot_matrix(judgement_of()))
    edges, nodes = figure.axes[:2]
    assert cells(edges) == [[0.93, 0.4, 0.5], [0.3, 0.93, 0.5], [0.3, 0.4, 0.93]]
    assert [text.get_text() for text in edges.texts] == [".93", ".40", ".50", ".30", ".93", ".50", ".30", ".40", ".93"]
    assert np.array(cells(nodes)) == pytest.approx(np.array(cells(edges)) - 0.1)
    assert [label.get_text() for label in edges.get_yticklabels()] == list(KINDS)  # from top to bottom
    assert edges.yaxis_inverted() and (edges.get_xlabel(), edges.get_ylabel()) == ("tested under", "found under")


@pytest.mark.parametrize(("under", "place"), [("mean", (1, 1)), ("zero", (0, 1))])
def test_the_circuits_own_cell_is_framed(under: str, place: tuple[int, int]) -> None:
    """Found under mean; it may be judged under another ablation."""
    figure = plot_matrix(judgement_of(settings={"ablation": under}))
    for axes in figure.axes[:2]:
        (frame,) = [one for one in axes.patches if isinstance(one, Rectangle)]
        assert frame.get_xy() == place and not frame.get_fill()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the circuit itself"]


def test_no_cell_is_framed_where_the_circuits_ablation_is_not_among_them() -> None:
    judgement = judgement_of(settings={"ablation": "mine"}, circuit={})
    figure = drawn(plot_matrix(judgement))
    assert not figure.legends and not figure.axes[0].patches
    assert "mine" not in matrix_sentence(judgement)


def test_cells_that_were_not_tried_are_blank_and_numbers_of_any_sign_have_no_zero_before_the_point() -> None:
    some = {("edges", "mean", "mean"): 0.88, ("edges", "mean", "zero"): -0.04, ("edges", "zero", "zero"): 1.2}
    figure = drawn(plot_matrix(judgement_of(faithful=some)))
    assert [text.get_text() for text in figure.axes[0].texts] == [".88", "−.04", "1.20"]
    assert np.isnan(cells(figure.axes[0])[1][0])
    text = matrix_sentence(judgement_of(faithful=some))
    assert text.startswith("Found under mean, the circuit recovers .88 when tested under mean and −.04 under zero.")
    assert "1.04 under the ablation that they were found under and −.04 under others" in text


def test_the_sentence_of_the_matrix_says_the_circuits_own_row_of_each_level() -> None:
    text = matrix_sentence(judgement_of())
    assert "the circuit recovers .93 when tested under mean, .30 under zero and .50 under resample." in text
    assert "with all edges among its nodes it recovers .83 when tested under mean, .20 under zero" in text
    assert "circuits keep .93 under the ablation that they were found under and .40 under others" in text


def test_of_one_row_no_mean_is_said() -> None:
    text = matrix_sentence(judgement_of(faithful={("edges", "mean", "mean"): 0.9, ("edges", "mean", "zero"): 0.2}))
    assert text.startswith("Found under mean, the circuit recovers .90 when tested under mean and .20 under zero. F")


def effects() -> dict[str, float]:
    return {"input->m0": 0.5, "m0->a1.h0<v>": 0.018, "a1.h0->m1": 0.002, "m1->logits": -0.02, "m0->logits": 0.1}


def test_every_edge_stands_above_the_random_paths_and_superfluous_ones_have_their_own_colour_and_shape() -> None:
    judgement = judgement_of(effects())
    figure = drawn(plot_minimality(judgement))
    (axes,) = figure.axes
    kept, idle = axes.collections
    assert sorted(kept.get_offsets()[:, 0]) == [0.018, 0.1, 0.5]
    assert sorted(idle.get_offsets()[:, 0]) == [-0.02, 0.002]
    assert min(*kept.get_offsets()[:, 1], *idle.get_offsets()[:, 1]) > 1 >= axes.patches[0].get_data().values.max()
    assert kept.get_paths()[0].vertices.shape != idle.get_paths()[0].vertices.shape
    assert tuple(kept.get_facecolor()[0][:3]) != tuple(idle.get_edgecolor()[0][:3])
    assert axes.lines[0].get_xdata() == pytest.approx([0.0171, 0.0171])  # the .9 quantile of 0, .001, ..., .019
    low, high = axes.get_xlim()
    assert low < -0.02 and high > 0.5
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["edge", "superfluous edge", "random paths", "their .9 quantile"]


def test_the_sentence_of_the_strip_counts_edges_above_the_quantile_and_superfluous_ones() -> None:
    assert minimality_sentence(judgement_of(effects())) == (
        "Cut one at a time, 3 of 5 edges change the loss by more than .9 of 20 edges of random paths do (0.017 nats); "
        "2 are superfluous. input->m0 matters most: 0.5 nats."
    )


def test_random_edges_among_those_that_were_cut_are_not_drawn_as_the_circuits() -> None:
    judgement = judgement_of(effects())
    edges = judgement.edges.assign(kept=[True, False, True, True, True])
    points = [one.get_offsets()[:, 0] for one in plot_minimality(replace(judgement, edges=edges)).axes[0].collections]
    assert sorted(np.concatenate(points)) == [-0.02, 0.002, 0.1, 0.5]
    assert "3 of 5" not in minimality_sentence(replace(judgement, edges=edges))


@pytest.mark.parametrize("null", [[0.0], [0.0] * 30, [1e-12, -1e-12], [5.0, -700.0, 1e4]])
def test_a_strip_can_be_drawn_of_any_numbers(null: list[float]) -> None:
    drawn(plot_minimality(judgement_of({"input->m0": 0.0}, null)))
    drawn(plot_minimality(judgement_of(effects(), null)))


def test_rivals_are_drawn_by_what_they_lack() -> None:
    figure = drawn(plot_rivals(judgement_of()))
    line = figure.axes[0].lines[-1]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0, 10, 100], [0.93, 0.8, 0.6])
    assert rivals_sentence(judgement_of()) == (
        "Without the 100 strongest edges of the circuit, another of 300 edges, 60 of them shared, recovers .60."
    )


def test_rivals_that_lead_nowhere_are_told() -> None:
    judgement = judgement_of()
    rivals = judgement.rivals.assign(edges=[0, 0, 300])
    assert rivals_sentence(replace(judgement, rivals=rivals)).endswith(
        "Without 0 and 10, the edges of highest score hold no path from input to logits."
    )


def test_columns_stand_in_the_order_of_rows() -> None:
    some = {("edges", a, b): 0.5 for a in ("zero", "mean") for b in ("mine", "mean", "zero")}
    axes = plot_matrix(judgement_of(faithful=some)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["zero", "mean", "mine"]


def test_what_was_not_computed_is_not_drawn_but_said() -> None:
    judgement = judgement_of()
    empty = {name: getattr(judgement, name).head(0) for name in ("matrix", "edges", "null", "rivals")}
    judgement = replace(judgement, **empty)
    for plot in (plot_matrix, plot_minimality, plot_rivals):
        with pytest.raises(SettingError, match="empty"):
            plot(judgement)
    sentences = [say(judgement) for say in (matrix_sentence, minimality_sentence, rivals_sentence)]
    assert sentences == ["No other ablation was tried.", "No edge was cut alone.", "No other circuit was looked for."]


@pytest.mark.parametrize("name", HOSTILE[::9])
def test_names_are_drawn_as_they_are(name: str) -> None:
    table = {(level, *pair): value for (level, *pair), value in matrix((name,)).items()}
    figure = drawn(plot_matrix(judgement_of(faithful=table, settings={"ablation": name}, circuit={})))
    assert figure.axes[0].get_title() == plots.plain(name)
    drawn(plot_minimality(judgement_of({f"{name}->m0": 1.0})))


def test_they_are_among_the_plots_of_the_package() -> None:
    assert plots.plot_matrix is plot_matrix and plots.minimality_sentence is minimality_sentence
