"""Hit@10 of circuits of other sizes, drawn small beside the size slider once it is asked for: that takes seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.errors import SettingError
from kcwb.evaluation.sizes import size_curve
from kcwb.progress import ProgressCallback
from kcwb.workbench import tables
from kcwb.workbench.panels.life import Living
from kcwb.workbench.panels.results import Found, parameter, resizable
from kcwb.workbench.panels.widgets import Group

_COLOURS = {"D_val": "#0072b2", "D_test": "#d55e00"}
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 330, 12, 72  # of what is drawn, pixels


class Sizes(Group):
    """A button that tests circuits of other sizes, and the place where they are drawn; the one on screen is marked.

    They are tested on the worker of `panel`; `shown` gives what is on screen there.
    """

    def __init__(self, panel: Living, shown: Callable[[], Found | None]) -> None:
        self._panel, self._shown = panel, shown
        tip = "Test circuits of other sizes, cut from the same scores"
        self.button = panel._button("Sizes", "line-chart", self.measure, tooltip=tip)
        self.drawn = W.HTML(layout=W.Layout(margin="0 0 0 90px"))

    def measure(self) -> None:
        """Test circuits of other sizes; returns at once, see the panel's `wait`."""
        found, panel = self._shown(), self._panel
        if found is None or found.task is None or not resizable(found.circuit):
            raise SettingError("Sizes are cut from scores and tested on facts: press Run, with a method that scores.")
        circuit, task = found.circuit, found.task

        def done(table: pd.DataFrame) -> None:
            found.sizes = table
            self.draw()

        def job(progress: ProgressCallback) -> pd.DataFrame:
            return size_curve(panel.model, circuit, task, progress=progress)

        panel._begin("sizes", job, done, "Testing other sizes")

    def draw(self) -> None:
        """What is known of other sizes of the circuit on screen."""
        self.drawn.value = self.to_html()

    def to_html(self) -> str:
        """The same as HTML; empty if it was not asked for."""
        found = self._shown()
        if found is None or found.sizes is None:
            return ""
        return tables.styled(_curve(found.sizes, parameter(found.circuit, "edges")))


def _curve(table: pd.DataFrame, marked: float | None) -> str:
    """Hit@10 against the number of edges asked for, on a log scale, as SVG in the colours of the page."""
    sizes: list[int] = sorted(set(table["asked"].tolist()))
    low, high = math.log(sizes[0]), math.log(sizes[-1])

    def x(size: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (math.log(size) - low) / ((high - low) or 1), 1)

    def y(hit: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * hit, 1)

    def words(left: float, top: float, text: str, anchor: str = "middle") -> str:
        return f'<text x="{left}" y="{top}" text-anchor="{anchor}" style="fill:var(--kc-muted)">{text}</text>'

    line = 'style="stroke:var(--kc-line)"'
    parts = [f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y(hit)}" y2="{y(hit)}" {line}/>' for hit in (0, 0.5, 1)]
    parts += [words(_LEFT - 5, y(hit) + 3.5, str(hit), "end") for hit in (0, 0.5, 1)]
    parts += [words(x(size), _BOTTOM + 14, f"{size:,}") for size in sizes]
    if marked is not None and sizes[0] <= marked <= sizes[-1]:
        at = f'x1="{x(marked)}" x2="{x(marked)}" y1="{_TOP - 8}" y2="{_BOTTOM}"'
        parts.append(f'<line {at} style="stroke:var(--kc-ink);stroke-dasharray:3 2"/>')
    for number, (split, colour) in enumerate(_COLOURS.items()):
        rows: list[Any] = list(table[table["split"] == split].itertuples())
        if not rows:  # all facts are in D_val
            continue
        points = " ".join(f"{x(row.asked)},{y(row.hit)}" for row in rows)
        parts.append(f'<polyline points="{points}" style="fill:none;stroke:{colour};stroke-width:1.6"/>')
        for row in rows:
            told = f"{split}: {row.edges:,} edges, Hit@10 {tables.estimate(row.hit, row.low, row.high)}"
            dot = f'cx="{x(row.asked)}" cy="{y(row.hit)}" r="3" style="fill:{colour}"'
            parts.append(f"<circle {dot}><title>{told}</title></circle>")
        dot = f'<tspan style="fill:{colour}">\u25cf</tspan>'
        parts.append(words(_RIGHT + 12, _TOP + 4 + 16 * number, f"{dot} Hit@10, {split} (n={rows[0].n})", "start"))
    parts.append(words(_RIGHT + 24, _BOTTOM + 14, "edges", "start"))
    told = "Hit@10 of circuits of other sizes, alone"
    size = f'width="{_RIGHT + 150}" height="{_BOTTOM + 20}" style="max-width:100%;font-size:11px"'
    return (
        f'<svg viewBox="0 0 {_RIGHT + 150} {_BOTTOM + 20}" {size} role="img" aria-label="{told}">{"".join(parts)}</svg>'
    )
