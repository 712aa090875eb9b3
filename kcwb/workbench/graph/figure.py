"""A circuit as seen, as a figure of matplotlib: for LaTeX as PDF, with text as text and no white margins.

The same shapes, colours and sizes as `js/painter.js` paints, with the same labels left out where there is no room. One
unit is a pixel of the screen, a 96th of an inch.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextToPath

from kcwb.workbench.graph.drawing import COLOURS, DASHES, Drawing, Place
from kcwb.workbench.graph.seen import Box, Link, lit, seen_of
from kcwb.workbench.graph.svg import text_on
from kcwb.workbench.plots.figure import Plot, plain

_GUTTER, _HEAD = 40, 8  # pixels, for the labels of layers; above
_PIXEL = 72 / 96  # points
_FAINT = 0.13  # how opaque is what is not lit
_WIDE = 1000  # pixels, where nobody looks
_MARKED = 1.05  # from which scale on marks stand below labels


def figure_of(drawing: Drawing, state: Mapping[str, Any], view: Mapping[str, Any], height: int) -> Plot:
    """Draw what is seen; parameters as in `seen_of`, and the height in pixels where no page says it."""
    boxes, links = seen_of(drawing, state, view)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # such letters are drawn as boxes
        return _Painter(drawing, boxes, links, state, view, height).figure


def save_figure(figure: Plot, path: str, kind: str) -> None:
    """Write it as `pdf`, `svg` or `png`, the same each time; letters stay letters."""
    told = {"pdf": {"Creator": MARK, "CreationDate": None}, "svg": {"Creator": MARK, "Date": None}}
    metadata = told.get(kind, {"Software": MARK})
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "kcwb"}):
        figure.savefig(path, format=kind, metadata=metadata, dpi=192)


MARK = "kcwb.CircuitGraph"
"""What these files say of who wrote them."""


class _Painter:
    """One picture; (x, y) of the screen are scale * (stretch * x, y) + (left, top) of the drawing."""

    def __init__(
        self, drawing: Drawing, boxes: Sequence[Box], links: Sequence[Link], state: Mapping[str, Any],
        view: Mapping[str, Any], height: int,
    ) -> None:  # fmt: skip
        self.drawing, self.boxes, self.links, self.state = drawing, boxes, links, state
        self.ink = COLOURS["dark" if view.get("dark") else "light"]
        if all(key in view for key in ("width", "height", "scale", "left", "top", "stretch")):
            self.width, self.height, self.scale = view["width"], view["height"], view["scale"]
            self.left, self.top, self.stretch = view["left"], view["top"], view["stretch"]
        else:
            self._fit(_WIDE, height)
        self.figure = Plot(figsize=(self.width / 96, self.height / 96))
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        self.axes.axis("off")
        self.size = max(11.0, min(16.0, 13 * self.scale))
        self.at = {box: self._screen((self.stretch * box.x, box.y)) for box in boxes}
        self.sizes: dict[Box, tuple[float, float]] = {}
        self.labelled: set[Box] = set()
        self._measure()
        self._bands()
        light = lit(boxes, links, state)
        front = None if light is None else {*light[0], *(box for box in boxes if set(box.names) & set(state["pinned"]))}
        for link in links:
            faint = light is not None and link not in light[1]
            self._link(link, _FAINT if faint else 1.0, lit=light is not None and not faint)
        for box in sorted(boxes, key=lambda box: box in self.labelled):
            self._box(box, 1.0 if front is None or box in front else _FAINT)

    def _screen(self, point: Place) -> Place:
        return self.scale * point[0] + self.left, self.scale * point[1] + self.top

    def _fit(self, width: int, height: int) -> None:
        """All of it, as wide as the window, as the page does at first."""
        self.width, self.height, self.scale, self.left, self.top, self.stretch = width, height, 1.0, 0.0, 0.0, 1.0
        if not self.boxes:
            return
        xs, ys = [box.x for box in self.boxes], [box.y for box in self.boxes]
        room = (width - _GUTTER - 16, height - 2 * _HEAD)
        wanted = (max(ys) - min(ys) + 36) * room[0] / room[1] / (max(xs) - min(xs) + 88)
        self.stretch = max(self.drawing.tightest, min(2.4, wanted))
        wide, high = self.stretch * (max(xs) - min(xs)) + 88, max(ys) - min(ys) + 36
        self.scale = min(1.3, room[0] / wide, room[1] / high)
        self.left = _GUTTER + room[0] / 2 - self.scale * self.stretch * (max(xs) + min(xs)) / 2
        self.top = _HEAD + room[1] / 2 - self.scale * (max(ys) + min(ys)) / 2

    def _measure(self) -> None:
        """How large each box is, and whether its label has room: the strongest first."""
        small, taken = max(6.0, min(13.0, 12 * self.scale)), list[tuple[float, float, float, float, Box]]()
        taken += [(*self.at[box], small / 2, small / 2, box) for box in self.boxes]
        pinned = {*self.state["pinned"], *self.state["notes"], *self.state["selected"]}

        def rank(box: Box) -> int:
            if box.kind in ("input", "logits"):
                return 3
            return 2 if box.group is not None else int(bool(pinned & set(box.names)))

        for box in sorted(self.boxes, key=lambda box: (-rank(box), -box.weight)):
            least = max(60.0, min(150.0, 110 * self.scale)) if rank(box) == 3 else 0.0
            width, height = max(least, _width(box.label, self.size) + 14), self.size + 8
            x, y = self.at[box]
            if rank(box) == 3 or not any(
                one is not box and abs(ox - x) < (width + w) / 2 + 1 and abs(oy - y) < (height + h) / 2 - 1
                for ox, oy, w, h, one in taken
            ):
                self.labelled.add(box)
                self.sizes[box] = width, height
                taken.append((x, y, width, height, box))
            else:
                self.sizes[box] = small * (1.4 if box.kind == "mlp" else 1), small

    def _bands(self) -> None:
        self.axes.add_patch(Rectangle((0, 0), self.width, self.height, facecolor=self.ink["bg"], linewidth=0))
        pitch = self.drawing.pitch * self.scale
        every = 1 if pitch >= 12 else 2 if pitch >= 6 else 5
        for i, row in enumerate(self.drawing.rows):
            y = self.scale * row["y"] + self.top
            if i % 2 == 0:
                band = Rectangle((0, y - pitch / 2), self.width, pitch, facecolor=self.ink["band"], linewidth=0)
                self.axes.add_patch(band)
            if i % every == 0:
                self._write(f"L{row['layer']}", 12, y, 11, self.ink["muted"], "left")

    def _link(self, link: Link, opaque: float, lit: bool) -> None:
        points = [self._screen(point) for point in link.points(self.stretch)]
        colour = self.ink["muted" if link.gone else "forced" if link.forced else link.tone]
        least = 1.8 if lit else 0.0
        strength = max(0.75, link.strength) if lit and not self.drawing.sure else link.strength
        thin = max(0.65, min(1.5, self.scale)) * _PIXEL
        width = (1.0 if link.gone else max(least, link.width)) * thin
        dashes = [1, 5] if link.gone else list(DASHES[link.port])
        alpha = opaque * (0.8 if link.gone and lit else 0.5 if link.gone else strength)
        codes = [Curve.MOVETO, *([Curve.CURVE4 if len(points) == 4 else Curve.CURVE3] * (len(points) - 1))]
        style: Any = (0, [length * thin for length in dashes]) if dashes else "solid"
        self.axes.add_patch(
            PathPatch(Curve(points, codes), facecolor="none", edgecolor=colour, linewidth=width, linestyle=style,
                      alpha=alpha, capstyle="butt")
        )  # fmt: skip
        if len(self.links) <= 300 and not link.gone:
            self._arrow(points, link, max(least, link.width), colour, alpha)

    def _arrow(self, points: list[Place], link: Link, width: float, colour: str, alpha: float) -> None:
        (x, y), (w, h), low, high = self.at[link.end], self.sizes[link.end], 0.3, 1.0
        for _ in range(9):
            middle = (low + high) / 2
            px, py = _on(points, middle)
            inside = abs(px - x) < w / 2 + 1 and abs(py - y) < h / 2 + 1
            low, high = (low, middle) if inside else (middle, high)
        (px, py), (bx, by), length = _on(points, low), _on(points, max(0.0, low - 0.03)), 4 + 1.1 * width
        angle = math.atan2(py - by, px - bx)
        barbs = [(px + length * math.cos(angle + turn), py + length * math.sin(angle + turn)) for turn in (2.7, -2.7)]
        self.axes.add_patch(Polygon([(px, py), *barbs], closed=True, facecolor=colour, linewidth=0, alpha=alpha))

    def _box(self, box: Box, opaque: float) -> None:
        (x, y), (w, h), fill = self.at[box], self.sizes[box], self.ink[box.tone]
        chosen, side = set(box.names) <= set(self.state["selected"]), box.members[0].side if box.group is None else None
        alpha = opaque * (0.4 if not box.used and not chosen else 1.0)
        rim = self.ink["ink"] if chosen else self.ink[side or "rim"]
        radius = {"mlp": h / 2, "input": 2, "logits": 2}.get(box.kind, 4)
        for shift in (3, 0) if box.group is not None else (0,):  # a stack of cards
            shape = f"round,pad=0,rounding_size={min(radius, h / 2, w / 2):.2f}"
            self.axes.add_patch(
                FancyBboxPatch((x - w / 2 + shift, y - h / 2 - shift), w, h, boxstyle=shape, facecolor=fill,
                               edgecolor=rim, linewidth=(2.5 if chosen else 2 if side else 1) * _PIXEL, alpha=alpha)
            )  # fmt: skip
        if box in self.labelled:
            self._write(box.label, x, y, self.size, text_on(fill), alpha=alpha)
            if box.group is None and self.scale >= _MARKED:
                self._write(box.members[0].mark, x, y + h / 2 + 8, 11, self.ink["muted"], alpha=alpha)
        for names, colour in ((self.state["notes"], "note"), (self.state["pinned"], "relation")):
            if set(names) & set(box.names):
                dot = Circle((x + w / 2 - 1, y - h / 2 + 1), 3.5, facecolor=self.ink[colour], edgecolor=self.ink["bg"])
                self.axes.add_patch(dot)

    def _write(
        self, text: str, x: float, y: float, size: float, colour: str, at: str = "center", alpha: float = 1.0
    ) -> None:
        self.axes.text(
            x, y, plain(text), fontsize=size * _PIXEL, color=colour, ha=at, va="center_baseline", alpha=alpha
        )


def _width(text: str, size: float) -> float:
    prop = FontProperties(size=size)
    return float(TextToPath().get_text_width_height_descent(plain(text).replace(r"\$", "$"), prop, ismath=False)[0])


def _on(points: list[Place], t: float) -> Place:
    """A point of a Bézier curve."""
    while len(points) > 1:
        points = [(x + t * (u - x), y + t * (v - y)) for (x, y), (u, v) in itertools.pairwise(points)]
    return points[0]
