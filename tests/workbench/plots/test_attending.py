"""Bars of why a head attends: what they show is what the table says."""

from __future__ import annotations

import pandas as pd
import pytest

from kcwb.errors import SettingError
from kcwb.workbench.plots import plot_attending

SCORES = {"q": {"input": 0.5, "m0": -2.0, "a0.h1": 1.0, "biases": 0.25}, "k": {"input": 3.0, "$m^0$": -0.5}}


def table(**more):
    rows = [("a1.h2", side, sender, score) for side, part in SCORES.items() for sender, score in part.items()]
    return pd.DataFrame(rows, columns=["head", "side", "sender", "score"]).assign(**more)


def bars(axes):
    widths = [float(bar.get_width()) for bar in axes.patches]
    return dict(zip([label.get_text() for label in axes.get_yticklabels()], widths, strict=True))


def test_the_strongest_come_first_and_the_rest_are_one_bar():
    figure = plot_attending(table(), 2)
    query, key = figure.axes
    assert list(bars(query).items()) == [("m0", -2.0), ("a0.h1", 1.0), ("2 others", 0.75)]
    assert bars(key) == {"input": 3.0, r"\$m^0\$": -0.5}
    assert query.yaxis_inverted()
    assert query.get_title() == "into the query: -0.25" and key.get_title() == "into the key: +2.50"
    assert figure._repr_png_()[0].startswith(b"\x89PNG")


def test_contrasts_are_drawn_where_there_are_any():
    contrasted = table(contrast=[1.0, 0.0, 0.0, 0.0, 2.0, 0.0])
    assert bars(plot_attending(contrasted).axes[0])["input"] == 1.0
    assert bars(plot_attending(contrasted, value="score").axes[0])["input"] == 0.5


def test_a_table_of_several_heads_or_of_something_else_is_refused():
    two = pd.concat([table(), table(head="a0.h0")])
    with pytest.raises(SettingError, match="Bars show one head; the table has 2"):
        plot_attending(two)
    with pytest.raises(SettingError, match="one row for each side and sender; take means first"):
        plot_attending(pd.concat([table(prompt=0), table(prompt=1)]))
    with pytest.raises(SettingError, match="has no column side"):
        plot_attending(table().drop(columns="side"))
    with pytest.raises(SettingError, match="the table has 0"):
        plot_attending(table().iloc[:0])
