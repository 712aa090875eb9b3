"""What all plots share: a Figure of its own for each, one look, nothing global, nothing printed, no pyplot.

Text from outside (tokens, facts, names) is drawn as it is: a `$` begins no formula, what cannot be seen is written as
its escape.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kcwb.errors import SettingError
from kcwb.workbench.tables import shorten
from kcwb.workbench.tables import text as escaped

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e6ea"}
INK, MUTED = "#1f2328", "#656d76"
# control characters, marks that turn the direction of writing, characters without width, halves of characters
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


class Plot(Figure):
    """A Figure that a notebook draws when it is the value of a cell, whatever matplotlib's backend is."""

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=144)
        return buffer.getvalue(), {"width": round(100 * self.get_figwidth())}

    def draw(self, renderer: Any) -> None:
        """Draw without remarks on letters that the font lacks: they are drawn as boxes."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            super().draw(renderer)


def picture(plot: Plot, words: str) -> str:
    """A plot as an image in HTML, described by `words`."""
    png, size = plot._repr_png_()
    source = base64.b64encode(png).decode("ascii")
    return (
        f'<img class="kc-picture" alt="{escaped(words, 1000)}" width="{size["width"]}" '
        f'style="max-width:100%;border-radius:4px" src="data:image/png;base64,{source}">'
    )


def plain(text: object, longest: int = 60) -> str:
    """Any text as matplotlib draws it verbatim: one line, no formulas, shortened."""
    shown = _UNSEEN.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), str(text))
    return shorten(shown, longest).replace("$", r"\$")


def panes(count: int, width: float, height: float, *, sharey: bool = True) -> tuple[Plot, list[Axes]]:
    """A figure of axes side by side, each of a width and a height in inches."""
    with sns.axes_style("white", _STYLE):
        figure = Plot(figsize=(width * count, height), layout="constrained")
        return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def finish(figure: Plot, handles: Sequence[Any], title: str | None, legend_at: str = "lower") -> None:
    """Title and legend; the figure grows by the lines that the legend takes."""
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(len(handles), int(11 * figure.get_figwidth() / (longest + 6))))
        figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns) - 0.22)
        place: Any = f"outside {legend_at} center"
        figure.legend(handles=handles, loc=place, ncols=columns, frameon=False, fontsize=9)
    if title:
        figure.suptitle(plain(title, 90), fontsize=11)


def need(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse a table that lacks a column."""
    missing = [name for name in columns if name not in table]
    if missing:
        raise SettingError(
            f"The table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns)) or 'none'}."
        )


def one_each(table: pd.DataFrame, keys: Sequence[str]) -> None:
    """Refuse a table that has two rows of one thing, which would be drawn as their mean, or none."""
    if table.empty or bool(table.duplicated(list(keys)).any()):
        raise SettingError(f"Bars need one row for each {' and '.join(keys)}; take means first.")


def levels(axes: Axes, *values: float) -> None:
    """Lines to compare with."""
    for value in values:
        axes.axhline(value, color=MUTED, linewidth=0.8, linestyle="--", zorder=1)


def band(axes: Axes, table: pd.DataFrame, x: str, y: str, colour: Any, **line: Any) -> None:
    """A line over a column, and its interval `low` to `high`."""
    table = table.sort_values(x, kind="stable")
    sns.lineplot(x=table[x], y=table[y], color=colour, errorbar=None, ax=axes, zorder=3, **line)
    axes.fill_between(table[x], table["low"], table["high"], color=colour, alpha=0.15, linewidth=0)


def palette_of(names: pd.Series) -> dict[Any, Any]:
    """A colour per name, safe for colour blindness, in the order of first mention."""
    found = list(dict.fromkeys(names))
    return dict(zip(found, sns.color_palette("colorblind", len(found)), strict=True))
