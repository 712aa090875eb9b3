"""Why a head looks where it looks, as bars: who makes its query, who makes its key."""

from __future__ import annotations

import pandas as pd
from matplotlib.patches import Patch

from kcwb.errors import SettingError
from kcwb.reading.attending import BIASES, CUT
from kcwb.settings import Count
from kcwb.workbench.plots.figure import MUTED, Plot, finish, need, one_each, panes, plain

_FOR, _AGAINST = "#0072b2", "#d55e00"
_SIDES = {"q": "into the query", "k": "into the key"}


def plot_attending(table: pd.DataFrame, n: Count = 8, *, value: str | None = None, title: str | None = None) -> Plot:
    """Draw the strongest senders into a head's query and key, a pane each; the rest of a side is one bar.

    Parameters
    ----------
    table
        As of `kcwb.reading.why_attends`, of one head.
    n
        How many senders.
    value
        `score` or `contrast`; None for `contrast` where the table has it.
    title
        A heading; None for the head's name.

    Raises
    ------
    SettingError
        If a column is missing, the table is empty, or holds several heads or prompts.
    """
    value = value or ("contrast" if "contrast" in table else "score")
    need(table, ("head", "side", "sender", value))
    heads = table["head"].unique()
    if len(heads) != 1:
        raise SettingError(f"Bars show one head; the table has {len(heads)}. Take the rows of one.")
    one_each(table, ["side", "sender"])
    sides = [side for side in _SIDES if (table["side"] == side).any()]
    figure, drawn = panes(len(sides), 4.2, 1.4 + 0.26 * (n + 1), sharey=False)
    for axes, side in zip(drawn, sides, strict=True):
        values = table[table["side"] == side].set_index("sender")[value]
        ordered = values.loc[values.abs().sort_values(ascending=False, kind="stable").index]
        shown, rest = ordered.iloc[:n], ordered.iloc[n:]
        names, sizes = [*map(plain, shown.index)], shown.tolist()
        colours = [MUTED if name in (BIASES, CUT) else _FOR if size > 0 else _AGAINST for name, size in shown.items()]
        if len(rest):
            names, sizes, colours = [*names, f"{len(rest)} others"], [*sizes, rest.sum()], [*colours, MUTED]
        axes.barh(range(len(names)), sizes, color=colours, height=0.74)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", labelsize=9, length=0)
        axes.set_title(f"{_SIDES[side]}: {values.sum():+.2f}", fontsize=10)
        axes.set_xlabel("attention score" if value == "score" else "attention score, minus the other prompts'")
    handles = [Patch(color=_FOR, label="looks there"), Patch(color=_AGAINST, label="looks away")]
    finish(figure, [*handles, Patch(color=MUTED, label="no node's, or others")], title or str(heads[0]))
    return figure
