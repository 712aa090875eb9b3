"""The instrument: the one module, in JavaScript, that draws a circuit and lets a person play it.

Its files (``js/``) are joined here, without a bundler: the colours of `drawing`, `circuit.js` (what is shown),
`painter.js` (the canvas), `aside.js`, `asking.js`, `reading.js` and `heads.js` (beside it: answers, a prompt of one's
own, one node, all heads of its layer), `legend.js`, `acts.js` (what is done to what is selected), `hand.js` (mouse and
keys) and `instrument.js` (`render`, by the contract of anywidget). A widget (`widget.py`) runs it with a model that
Python answers, a page (`page.py`) with the plain object of `page.js`.

All text reaches it as JSON and is set by ``textContent`` or drawn on a canvas, never parsed as HTML.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from kcwb.workbench.graph.drawing import COLOURS, DASHES, Drawing

_FILES = resources.files("kcwb.workbench.graph").joinpath("js")
_PARTS = (
    "circuit.js", "painter.js", "aside.js", "asking.js", "heads.js", "reading.js", "legend.js", "acts.js", "hand.js",
    "instrument.js",
)  # fmt: skip


@cache
def module() -> str:
    """The module's source; its default export has `render`."""
    return f"{_source()}\nexport default {{ render }};\n"


@cache
def script() -> str:
    """The same as a script of a page, which draws what the page holds in `kc-circuit`."""
    return f"(() => {{\n{_source()}\n{_read('page.js')}\n}})();\n"


def scene(drawing: Drawing) -> dict[str, Any]:
    """What is drawn, as JSON can hold it; a node's id is its place, for a name may be any text."""
    keys = ("title", "notice", "rows", "pitch", "tightest", "sides", "sure", "plan")
    view = {key: getattr(drawing, key) for key in keys}
    nodes = [node._asdict() for node in drawing.nodes]
    edges = [
        {"from": edge.start, "to": edge.end, **{key: getattr(edge, key) for key in _OF_EDGE}} for edge in drawing.edges
    ]
    view["differences"] = [list(row) for row in drawing.differences]
    return view | {"withRoles": drawing.with_roles, "nodes": nodes, "edges": edges}


_OF_EDGE = ("port", "tone", "lines", "weight", "width", "strength", "bend", "pi")


def _source() -> str:
    """All files but the page's; colours and style have no other place."""
    dashes = {port: list(lengths) for port, lengths in DASHES.items()}
    given = {"COLOURS": COLOURS, "DASHES": dashes, "CSS": _read("instrument.css")}
    constants = "\n".join(f"const {name} = {json.dumps(value)};" for name, value in given.items())
    return "\n".join([constants, *map(_read, _PARTS)])


def _read(name: str) -> str:
    return _FILES.joinpath(name).read_text(encoding="utf-8")
