"""A circuit as an SVG drawing, for papers and slides: the picture of `graph_view` without its page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from kcwb.settings import Count, Positive
from kcwb.verbs import verb
from kcwb.workbench.graph.drawing import (
    COLOURS,
    DASHES,
    ROLES,
    Drawing,
    Look,
    Node,
    Place,
    Roles,
    control_points,
    draw,
    width_of,
)

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.ensemble import Ensemble

_HEIGHT, _ENDS = 21, 150  # of a node; the width of input and logits
_LEFT, _EDGE, _TOP, _BOTTOM = 44, 16, 40, 34  # margins: layer labels, right, title, legend
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LEGEND = 760  # the least width
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif"


@verb
def graph_svg(
    circuit: Circuit | Ensemble,
    *,
    roles: Roles | None = None,
    max_edges: Count = 2000,
    title: str | None = None,
    details: Mapping[str, str] | None = None,
    ensemble: Ensemble | None = None,
    aspect: Positive = 1.6,
    dark: bool = False,
) -> str:
    """Draw a circuit as SVG, in the fixed layout of `graph_view`.

    Parameters
    ----------
    circuit, roles, max_edges, title, details, ensemble
        As in `graph_view`; what hovering shows there is the `<title>` of a shape here.
    aspect
        The picture's width over its height, as nearly as columns can be moved without nodes touching.
    dark
        The colours of the dark theme.

    Returns
    -------
    str
        An SVG document that refers to nothing outside itself.

    Raises
    ------
    SettingError
        If `max_edges` or `aspect` is not positive, or a table of roles lacks its columns.
    CircuitError
        If an edge names a node that `circuit.nodes` lacks, or the ensemble is of another graph.
    """
    drawing = draw(circuit, Look(roles, max_edges, title, details, ensemble))
    ink = COLOURS["dark" if dark else "light"]
    places = _places(drawing, aspect)
    left = min((x for x, _ in places), default=0) - _ENDS / 2 - _LEFT
    right = max(max((x for x, _ in places), default=0) + _ENDS / 2 + _EDGE, left + _LEGEND)
    top = min((y for _, y in places), default=0) - _HEIGHT - _TOP
    bottom = max((y for _, y in places), default=0) + _HEIGHT + _BOTTOM
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": " ".join(f"{value:.1f}" for value in (left, top, right - left, bottom - top)),
            "width": f"{right - left:.0f}", "height": f"{bottom - top:.0f}", "font-family": _FONT,
        },
    )  # fmt: skip
    _add(root, "title", drawing.title or "Knowledge circuit")
    _add(root, "rect", x=left, y=top, width=right - left, height=bottom - top, fill=ink["bg"])
    for i, row in enumerate(drawing.rows):
        if i % 2 == 0:
            y = row["y"] - drawing.pitch / 2
            _add(root, "rect", x=left, y=y, width=right - left, height=drawing.pitch, fill=ink["band"])
        _add(root, "text", f"L{row['layer']}", x=left + 10, y=row["y"] + 4, font_size=11, fill=ink["muted"])
    _add_edges(root, drawing, places, ink)
    for node, place in zip(drawing.nodes, places, strict=True):
        _add_node(root, node, place, ink)
    words = " · ".join(part for part in (drawing.title, drawing.notice) if part)
    if words:
        _add(root, "text", words, x=left + 10, y=top + 20, font_size=14, font_weight=600, fill=ink["ink"])
    if not drawing.edges:
        _add(
            root, "text", "This circuit has no edges.", x=(left + right) / 2, y=(top + bottom) / 2, font_size=14,
            text_anchor="middle", fill=ink["muted"],
        )  # fmt: skip
    _add_legend(root, drawing, left + 10, bottom - 12, ink)
    return ElementTree.tostring(root, encoding="unicode")


def _places(drawing: Drawing, aspect: float) -> list[Place]:
    """Columns brought nearer or farther, so that the picture has the wanted shape."""
    xs, ys = [node.x for node in drawing.nodes], [node.y for node in drawing.nodes]
    if not xs:
        return []
    height = max(ys) - min(ys) + 2 * _HEIGHT + _TOP + _BOTTOM
    wanted = (aspect * height - _ENDS - _LEFT - _EDGE) / max(max(xs) - min(xs), 1)
    stretch = max(drawing.tightest, min(2.0, wanted))
    return [(node.x * stretch, node.y) for node in drawing.nodes]


def _add_edges(root: ElementTree.Element, drawing: Drawing, places: list[Place], ink: Mapping[str, str]) -> None:
    for edge in drawing.edges:
        start, end = places[edge.start], places[edge.end]
        points = [start, *control_points(start, end, edge.bend), end]
        first, *rest = (f"{x:.1f} {y:.1f}" for x, y in points)
        path = _add(
            root, "path", d=f"M{first}{'C' if len(rest) == 3 else 'Q'}{' '.join(rest)}", fill="none",
            stroke=ink[edge.tone], stroke_width=edge.width, stroke_opacity=edge.strength, **_dashes(edge.port),
        )  # fmt: skip
        _add(path, "title", "\n".join(edge.lines))


def _add_node(root: ElementTree.Element, node: Node, place: Place, ink: Mapping[str, str]) -> None:
    width = _ENDS if node.kind in ("input", "logits") else width_of(node.label)
    group, fill, (x, y) = _add(root, "g"), ink[node.tone], place
    _add(group, "title", "\n".join(node.lines))
    _add(
        group, "rect", x=x - width / 2, y=y - _HEIGHT / 2, width=width, height=_HEIGHT, fill=fill,
        rx={"head": 3, "mlp": 10}.get(node.kind, 2), stroke=ink["rim"],
    )  # fmt: skip
    _add(group, "text", node.label, x=x, y=y + 4.5, font_size=13, text_anchor="middle", fill=text_on(fill))


def _add_legend(root: ElementTree.Element, drawing: Drawing, x: float, y: float, ink: Mapping[str, str]) -> None:
    """Boxes for kinds and roles, lines for ports, in one row."""
    tones = {node.tone for node in drawing.nodes}
    boxes = {"head": "other head" if drawing.with_roles else "head", "mlp": "MLP"} | {
        role: role for role in ROLES if role in tones
    }
    ports = {"q": "into query", "k": "key", "v": "value", "direct": "MLP or logits"}
    for tone, words in {**boxes, **ports}.items():
        if tone in boxes:
            _add(root, "rect", x=x, y=y - 10, width=18, height=11, rx=3, fill=ink[tone], stroke=ink["rim"])
        else:
            look = {"fill": "none", "stroke": ink[tone], "stroke_width": 2.5, **_dashes(tone)}
            _add(root, "path", d=f"M{x:.1f} {y - 4:.1f}h18", **look)
        _add(root, "text", words, x=x + 24, y=y, font_size=12, fill=ink["muted"])
        x += 24 + 6.6 * len(words) + 14
    if drawing.sure:
        _add(root, "text", "opacity: share of draws", x=x, y=y, font_size=12, fill=ink["muted"])


def _dashes(port: str) -> dict[str, str]:
    return {"stroke_dasharray": " ".join(map(str, DASHES[port]))} if DASHES[port] else {}


def _add(
    parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: str | float
) -> ElementTree.Element:
    """A child element; ElementTree escapes its text, and what XML cannot hold is replaced."""
    written = {
        name.replace("_", "-"): value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
        for name, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, written)
    element.text = None if text is None else _NOT_XML.sub("\ufffd", text)
    return element


def text_on(fill: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = ((int(fill[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"
