"""Plots: what stands on the axes is what stood in the table."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kcwb.errors import SettingError
from kcwb.workbench.plots import (
    Plot,
    plain,
    plot_attention,
    plot_bars,
    plot_completeness,
    plot_faithfulness,
    plot_frontier,
    plot_heads,
    plot_knowledge,
    plot_lens,
)


@pytest.fixture(autouse=True)
def _calm(capsys: pytest.CaptureFixture[str]) -> Any:
    """No plot prints or warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capsys.readouterr() == ("", "")


def drawn(figure: Plot) -> Plot:
    """Draw the figure to the end, as a notebook does."""
    content, size = figure._repr_png_()
    assert content.startswith(b"\x89PNG") and len(content) > 3000 and size["width"] > 0
    return figure


def lens_table() -> pd.DataFrame:
    rows = []
    for quantity, who in (("rank", "object"), ("rank", "subject"), ("probability", "object"), ("hit_10", "object")):
        for layer in (2, -1, 0, 1):
            value = {"rank": 1000 / 4 ** (layer + 1), "probability": 0.2 * (layer + 1), "hit_10": 0.0}[quantity]
            rows.append((layer, quantity, who, value * (1 + (who == "subject")), 0.9 * value, 1.1 * value))
    return pd.DataFrame(rows, columns=["layer", "quantity", "who", "value", "low", "high"])


def test_lens_curves_run_over_layers_with_the_best_rank_at_the_top() -> None:
    figure = drawn(plot_lens(lens_table(), title="The capital of $France$"))
    rank, probability = figure.axes
    assert [line.get_xdata().tolist() for line in rank.lines] == [[-1, 0, 1, 2]] * 2
    assert rank.lines[0].get_ydata().tolist() == [1000, 250, 62.5, 15.625]
    assert rank.lines[1].get_ydata().tolist() == [2000, 500, 125, 31.25]
    assert rank.get_yscale() == "log" and rank.yaxis_inverted()
    assert [line.get_ydata().tolist() for line in probability.lines] == [pytest.approx([0, 0.2, 0.4, 0.6])]
    band = rank.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0.0, 225.0), (2.0, 1.1 * 15.625)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["object", "subject"]
    assert rank.lines[0].get_color() == probability.lines[0].get_color() != rank.lines[1].get_color()
    assert figure.get_suptitle() == r"The capital of \$France\$"


def test_lens_draws_the_quantities_that_are_asked_for() -> None:
    figure = plot_lens(lens_table(), ["hit_10"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["Hit@10"]
    with pytest.raises(SettingError, match=r"quantities=\['loss'\]: the table has rank, probability, hit_10"):
        plot_lens(lens_table(), ["loss"])
    with pytest.raises(SettingError, match="has no column who; it has layer"):
        plot_lens(lens_table().drop(columns="who"))


def test_one_fact_without_intervals_is_drawn() -> None:
    figure = drawn(plot_lens(lens_table().assign(low=math.nan, high=math.nan)))
    assert figure.axes[0].lines[0].get_ydata()[0] == 1000


def heat(figure: Plot) -> Any:
    return figure.axes[0].collections[0].get_array()


def test_heads_are_a_map_with_the_first_layer_at_the_bottom() -> None:
    table = pd.DataFrame({"layer": [0, 0, 2, 1, 5], "head": [0, 3, 1, 2, -1], "D_S": [1.0, -4.0, 2.0, math.nan, 9.0]})
    figure = drawn(plot_heads(table, "D_S", title="Subject"))
    cells = heat(figure)
    assert cells.shape == (3, 4)  # the head without a number leaves its place empty; an MLP has none
    assert cells[2, 0] == 1 and cells[2, 3] == -4 and cells[0, 1] == 2 and cells.mask.sum() == 9
    assert figure.axes[0].collections[0].get_clim() == (-4, 4)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "1", "0"]
    assert figure.axes[1].get_ylabel() == "D_S"
    named = pd.DataFrame({"node": ["a0.h0", "a0.h3", "a2.h1", "m1"], "D_S": [1.0, -4.0, 2.0, 7.0]})
    assert np.array_equal(heat(plot_heads(named, "D_S")).filled(0), cells.filled(0))


def test_numbers_of_one_sign_grow_from_zero() -> None:
    table = pd.DataFrame({"layer": [0, 1], "head": [0, 1], "share": [0.5, 2.0]})
    assert plot_heads(table, "share").axes[0].collections[0].get_clim() == (0, 2)
    assert drawn(plot_heads(table.assign(share=0.0), "share"))


def test_a_map_of_heads_that_cannot_be_drawn_is_refused() -> None:
    table = pd.DataFrame({"layer": [3, 3], "head": [1, 1], "z": [0.5, 2.0]})
    with pytest.raises(SettingError, match=r"a3\.h1 is in it twice"):
        plot_heads(table, "z")
    with pytest.raises(SettingError, match="it has no number"):
        plot_heads(table.assign(z=math.nan), "z")
    with pytest.raises(SettingError, match="no column w; it has layer, head, z"):
        plot_heads(table, "w")
    with pytest.raises(SettingError, match="no column node"):
        plot_heads(table.drop(columns="head"), "z")


def test_attention_is_drawn_with_tokens_and_without_the_future() -> None:
    tokens = ["0:<bos>", "1: The", "2: $x$", "3:\n"]
    values = np.tril(np.full((4, 4), 0.25)) + np.diag([0.75, 0.5, 0.25, 0.0])
    figure = drawn(plot_attention(pd.DataFrame(values, tokens, tokens), title="a1.h2"))
    cells = heat(figure)
    assert np.array_equal(cells.filled(0), values) and np.array_equal(cells.mask, np.triu(np.ones((4, 4), bool), 1))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0:<bos>", "1: The", r"2: \$x\$", r"3:\n"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0:<bos>", "1: The", r"2: \$x\$", r"3:\n"]
    assert sorted(text.get_text() for text in axes.texts) == ["0.25"] * 7 + ["0.50", "0.75", "1.00"]


def test_attention_to_what_comes_later_is_shown_if_there_is_some() -> None:
    values = pd.DataFrame(np.full((3, 3), 1 / 3))
    assert not np.ma.getmaskarray(heat(plot_attention(values))).any()
    long = pd.DataFrame(np.tril(np.full((40, 40), 0.01)))
    assert not plot_attention(long).axes[0].texts  # too many cells for numbers


@pytest.mark.parametrize("values", [[], [[math.nan]], [[1.5]], [[-0.5]]])
def test_what_is_no_attention_pattern_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(SettingError, match="shares between 0 and 1"):
        plot_attention(pd.DataFrame(values))


def curve(shift: float = 0.0) -> pd.DataFrame:
    share = np.array([-0.2, 0.5, 0.9]) + shift
    return pd.DataFrame(
        {"fraction": [0.001, 0.01, 1.0], "faithfulness": share, "low": share - 0.1, "high": share + 0.1}
    )


def test_faithfulness_is_drawn_over_sizes_with_its_interval() -> None:
    figure = drawn(plot_faithfulness({"signed": curve(), "absolute": curve(0.1)}, title="capital"))
    (axes,) = figure.axes
    levels, lines = axes.lines[:2], axes.lines[2:]
    assert [line.get_ydata()[0] for line in levels] == [0, 1] and axes.get_xscale() == "log"
    assert [line.get_xdata().tolist() for line in lines] == [[0.001, 0.01, 1.0]] * 2
    assert [line.get_ydata().tolist() for line in lines] == [[-0.2, 0.5, 0.9], pytest.approx([-0.1, 0.6, 1.0])]
    band = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
    assert {(0.01, 0.4), (0.01, 0.6), (1.0, 0.8)} <= band
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["signed", "absolute"]
    assert plot_faithfulness(curve()).legends == []


def test_the_empty_circuit_has_a_place_on_the_axis_of_sizes() -> None:
    table = curve()
    table.loc[0, "fraction"] = 0.0
    assert drawn(plot_faithfulness(table)).axes[0].get_xscale() == "symlog"
    with pytest.raises(SettingError, match="no faithfulness curve"):
        plot_faithfulness({})
    with pytest.raises(SettingError, match="no column high"):
        plot_faithfulness(table.drop(columns="high"))


def test_the_frontier_is_drawn_over_edges_a_pane_for_each_task() -> None:
    rows = [
        (m, edges, f, f - 0.1, f + 0.1)
        for m, up in (("eap", 0), ("gim", 0.2))
        for edges, f in ((0, up), (10, up), (90, 0.5))
    ]
    table = pd.DataFrame(rows, columns=["method", "edges", "faithfulness", "low", "high"])
    (axes,) = drawn(plot_frontier(table)).axes
    assert axes.get_xscale() == "log" and len(axes.lines) == 5  # the levels 0, .9 and 1, and two methods
    assert [line.get_xdata().tolist() for line in axes.lines[3:]] == [[10, 90]] * 2
    assert axes.lines[4].get_ydata().tolist() == [0.2, 0.5]
    both = pd.concat([table.assign(task="capital"), table.assign(task="ioi")])
    figure = drawn(plot_frontier(both))
    assert [axes.get_title() for axes in figure.axes] == ["capital", "ioi"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["eap", "gim"]
    with pytest.raises(SettingError, match="no curve"):
        plot_frontier(table[:0])
    with pytest.raises(SettingError, match="no column high"):
        plot_frontier(table.drop(columns="high"))


def bars_table() -> pd.DataFrame:
    rows = [
        (run, state, split, hit, hit - 0.1, hit + 0.05)
        for run, base in (("full model", 0.8), ("circuit", 0.6))
        for split, less in (("D_val", 0.0), ("D_test", 0.2))
        for state, hit in (("before", base - less), ("after", base - less - 0.3))
    ]
    return pd.DataFrame(rows, columns=["run", "state", "split", "hit", "low", "high"])


def test_bars_stand_side_by_side_with_their_intervals() -> None:
    table = bars_table()
    figure = drawn(plot_bars(table, "run", "hit", hue="state", column="split", label="Hit@10", title="a1.h0"))
    assert [axes.get_title() for axes in figure.axes] == ["D_val", "D_test"]
    for axes in figure.axes:
        some = table[table["split"] == axes.get_title()]
        heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in axes.patches}
        expected = [
            some[(some.run == r) & (some.state == s)] for r in ("full model", "circuit") for s in ("before", "after")
        ]
        assert [heights[x] for x in sorted(heights)] == [row["hit"].item() for row in expected]
        spans = sorted(tuple(map(tuple, path)) for lines in axes.collections for path in lines.get_segments())
        ends = [(x, row["low"].item(), row["high"].item()) for x, row in zip(sorted(heights), expected, strict=True)]
        assert np.array([(a[0], a[1], b[1]) for a, b in spans]) == pytest.approx(np.array(ends))
        assert [label.get_text() for label in axes.get_xticklabels()] == ["full model", "circuit"]
        assert min(map(abs, axes.get_ylim())) == 0
    assert [axes.get_ylabel() for axes in figure.axes] == ["Hit@10", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]


def test_bars_may_lack_rows_intervals_and_kinds() -> None:
    table = pd.DataFrame({"score": ["ES", "PS"], "value": [0.9, -0.2], "low": [0.8, math.nan], "high": [1.0, math.nan]})
    figure = drawn(plot_bars(table, "score"))
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.9, -0.2] and not figure.legends
    assert drawn(plot_bars(bars_table().iloc[1:], "run", "hit", hue="state", column="split"))
    with pytest.raises(SettingError, match="one row for each run and state; take means first"):
        plot_bars(bars_table(), "run", "hit", hue="state")
    with pytest.raises(SettingError, match="no column group"):
        plot_bars(bars_table(), "group", "hit")


def test_intervals_may_stand_in_any_columns() -> None:
    table = bars_table().iloc[:1].assign(low_10=0.1, high_10=0.9)
    (lines,) = plot_bars(table, "run", "hit", low="low_10", high="high_10").axes[0].collections
    assert lines.get_segments()[0][:, 1].tolist() == [0.1, 0.9]


def test_a_curve_in_any_order_is_the_same_curve() -> None:
    tables = curve(), curve().iloc[[2, 0, 1]]
    bands = [plot_faithfulness(table).axes[0].collections[0].get_paths()[0].vertices.tolist() for table in tables]
    assert bands[0] == bands[1]


def test_knowledge_is_drawn_by_category() -> None:
    rows = [
        ("capital", "factual", 0.9, 0.5, 20),
        ("antonym", "linguistic", 0.4, 0.1, 30),
        ("$a$", "factual", 1.0, 1.0, 2),
    ]
    table = pd.DataFrame(rows, columns=["relation", "category", "hit_10", "hit_1", "answers"])
    with pytest.raises(SettingError, match="one row for each relation"):  # which would be drawn as its mean
        plot_knowledge(pd.concat([table, table.assign(hit_10=0.0)]))
    figure = drawn(plot_knowledge(table))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\$a\$  (2)", "capital  (20)", "antonym  (30)"]
    assert sorted(bar.get_width() for bar in axes.patches) == [0.1, 0.4, 0.5, 0.9, 1.0, 1.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["factual", "linguistic"]


def test_completeness_is_drawn_with_its_intervals() -> None:
    rows = [(run, split, 10, hit, hit - 0.1, hit + 0.1) for run, hit in (("full model", 0.8), ("circuit", 0.5))
            for split in ("D_val", "D_test", "D_test, known")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["run", "split", "n", "hit", "low", "high"])
    figure = drawn(plot_completeness({"zero": table, "mean": table.assign(hit=table["hit"] / 2)}))
    assert [axes.get_title() for axes in figure.axes] == ["zero", "mean"]
    with pytest.raises(SettingError, match="no table of completeness"):
        plot_completeness({})
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.8, 0.8, 0.5, 0.5]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.4, 0.4, 0.25, 0.25]
    spans = [path[:, 1].tolist() for lines in figure.axes[0].collections for path in lines.get_segments()]
    assert np.array(spans) == pytest.approx(np.array([[0.7, 0.9]] * 2 + [[0.4, 0.6]] * 2))


def test_text_is_drawn_verbatim_and_what_is_unseen_as_its_escape() -> None:
    assert plain("a $x$ \\$y") == "a \\$x\\$ \\\\$y"
    assert plain("line\nbreak\x00\u202e\ud800") == r"line\nbreak\x00\u202e\ud800"
    assert plain("é 東京 🦜 <b>") == "é 東京 🦜 <b>" and len(plain("x" * 10_000)) == 60
    figure = drawn(plot_attention(pd.DataFrame([[1.0]], ["$\\frac{$"], ["東京 🦜 $$"]), title=r"$\nosuch{$"))
    for text in (*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels(), figure._suptitle):
        shown, is_math = text._preprocess_math(text.get_text())
        assert not is_math and shown.count("$") in (1, 2)
