"""What is drawn of a circuit and where: places, colours, widths and words, for the page and the SVG alike.

Layers run from bottom to top, a head stands in the column of its index, the MLP beside and just above its heads (in one
of three columns, by its layer, so that MLPs do not hide each other's edges), the input and the logits at the ends.
Nothing is left to chance or to physics: a circuit is drawn the same each time, and a node stands in the same column in
every circuit of a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from kcwb.errors import CircuitError, SettingError
from kcwb.workbench.graph.sureness import FAINTEST, with_sureness
from kcwb.workbench.tables import number, shorten

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.ensemble import Ensemble

ROLES = ("mover", "relation", "mixture", "suppressor")
"""Roles of a head that have a colour; heads of any other role are grey."""

SIDES = ("left", "right", "shared")
"""Which of two compared circuits holds an edge."""

_COMMON = {
    "mover": "#d55e00", "mixture": "#cc79a7", "suppressor": "#f0e442", "q": "#e69f00", "k": "#56b4e9",
    "left": "#e69f00", "right": "#56b4e9",
}  # fmt: skip
COLOURS: Mapping[str, Mapping[str, str]] = {
    "light": {
        "bg": "#ffffff", "ink": "#1f2328", "muted": "#656d76", "line": "#d5d9de", "band": "#f5f6f8",
        "field": "#ffffff", "note": "#8a5300", "rim": "#7b838c", "head": "#e6e9ed", "mlp": "#d3d8de",
        "input": "#3d444d", "logits": "#3d444d", "relation": "#0072b2", "v": "#009e73", "direct": "#6e7781",
        "shared": "#6e7781", "forced": "#b5179e", **_COMMON,
    },
    "dark": {
        "bg": "#15181c", "ink": "#e6e8eb", "muted": "#9aa3ad", "line": "#353b43", "band": "#1b1f25",
        "field": "#1f242a", "note": "#f0b95a", "rim": "#89929d", "head": "#343b44", "mlp": "#464f5a",
        "input": "#c9d0d8", "logits": "#c9d0d8", "relation": "#3aa0e0", "v": "#14b887", "direct": "#99a2ac",
        "shared": "#99a2ac", "forced": "#f06ad8", **_COMMON,
    },
}  # fmt: skip
"""The only place where colours are named. Those of roles and of q, k, v are Okabe and Ito's, safe for colour blindness;
what they do not tell apart (head and MLP, key and value) shapes and dashes do."""

DASHES: Mapping[str, tuple[int, ...]] = {"q": (8, 4), "k": (2, 3), "v": (), "direct": ()}

_LABEL, _MARK, _NAME, _TEXT = 12, 22, 120, 600  # characters kept of a label, a mark, a name in a text, a long text
_CHARACTER, _PADDING = 7.5, 20  # width of a node: of a character, of what is around the text
_ROW = 26  # the least distance of two layers; a node is 21 high
_PLACES = {"subject": "subject", "relation": "relation", "end": "END"}
_WAVE = (0.0, 1.5, 3.0, 1.5)  # in which column the MLPs of successive layers stand
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")

Place = tuple[float, float]
Roles = Mapping[str, str] | pd.DataFrame


class Node(NamedTuple):
    """A node where it stands."""

    name: str
    kind: str  # "input", "head", "mlp" or "logits"
    tone: str  # the name of its colour: its role, or its kind
    label: str  # one short line
    lines: list[str]  # what hovering shows
    x: float
    y: float
    side: str | None  # of SIDES, in a comparison
    layer: int
    role: str
    mark: str  # what may stand below the label: its role, or the start of its detail
    place: str  # where in a prompt it is at work: where it attends from END, where that is known


class Edge(NamedTuple):
    """An edge as it is drawn."""

    start: int  # places in `Drawing.nodes`
    end: int
    port: str  # "q", "k", "v" or "direct"
    tone: str  # the name of its colour: its port, or its side
    lines: list[str]
    weight: float  # what it may be hidden below
    width: float
    strength: float  # how opaque it is
    bend: tuple[str, float]  # as `control_points` takes it
    pi: float | None  # the share of draws that keep it, of an ensemble


class Drawing(NamedTuple):
    """All that is drawn."""

    title: str
    notice: str
    nodes: list[Node]
    edges: list[Edge]  # the weakest first, so that the strongest are drawn on top
    rows: list[dict[str, float]]  # layer and y, for the layers' labels
    pitch: float  # the distance of two layers
    tightest: float  # the factor of x at which neighbours would touch
    with_roles: bool
    sure: bool  # whether opacity is the share of draws that keep an edge
    sides: dict[str, str]  # side -> how the legend names it; empty unless two circuits are compared
    plan: dict[str, Any]  # where nodes that are not in the circuit would stand: heads' width and columns, MLPs' x
    differences: Sequence[Sequence[str]] = ()  # of two sessions: part, node, edge or group, what either says of it


class Look(NamedTuple):
    """How a circuit is to be drawn: parameters of `graph_view`."""

    roles: Roles | None
    max_edges: int
    title: str | None
    details: Mapping[str, str] | None
    ensemble: Ensemble | None = None


def draw(circuit: Circuit | Ensemble, look: Look) -> Drawing:
    """Lay out a circuit; of an ensemble its consensus at one half."""
    from kcwb.circuits.ensemble import Ensemble

    if isinstance(circuit, Ensemble):
        circuit, look = circuit.consensus(), look._replace(ensemble=circuit)
    table = circuit.edges.assign(side=None)
    table["weight"] = _sizes(circuit).fillna(0.0)
    table["words"] = [_score_words(score) for score in table["score"]]
    largest = float(table["weight"].max()) if len(table) else 0.0
    # without any scores all edges are alike; a circuit whose scores are all 0 is drawn thin
    table["share"] = 0.25 if table["score"].isna().all() else table["weight"] / (largest or 1.0)
    return _draw(circuit, table, {}, {}, look)


def draw_two(left: Circuit, right: Circuit, names: Sequence[str], look: Look) -> Drawing:
    """Lay out two circuits in one picture; `names` are what the legend calls them."""
    if isinstance(names, str) or len(names) != 2:
        raise SettingError(f"names={names!r}: give two, the left circuit's and the right one's.")
    both = left | right  # raises where graphs differ
    tables = [circuit.edges.assign(share=_own_share(circuit)) for circuit in (left, right)]
    table = tables[0].merge(tables[1], "outer", ["sender", "receiver"], suffixes=("_left", "_right"), indicator="side")
    table["side"] = table["side"].map({"left_only": "left", "right_only": "right", "both": "shared"})
    table["share"] = table["weight"] = table[["share_left", "share_right"]].max(axis=1)
    # halves of characters, which pandas refuses, become "?"
    short = [shorten(str(name), 40).encode("utf-8", "replace").decode("utf-8") for name in names]
    table["words"] = [
        "; ".join(
            f"{name}: {_score_words(score)}"
            for name, score, other in zip(short, (row.score_left, row.score_right), ("right", "left"), strict=True)
            if row.side != other
        )
        for row in table.itertuples()
    ]
    table = table.sort_values("share", ascending=False, kind="stable", ignore_index=True)  # ties: by name
    counts = table["side"].value_counts()
    words = {"left": f"only {short[0]}", "right": f"only {short[1]}", "shared": "shared"}
    sides = {side: f"{words[side]} ({counts.get(side, 0):,})" for side in SIDES}
    left_nodes, right_nodes = set(left.nodes["node"]), set(right.nodes["node"])
    held = {
        name: "shared" if name in left_nodes & right_nodes else "left" if name in left_nodes else "right"
        for name in both.nodes["node"]
    }
    return _draw(both, table, sides, held, look)


def control_points(start: Place, end: Place, bend: tuple[str, float]) -> list[Place]:
    """The control points between the ends of a Bézier curve: one for an arc, two for an S, as vis-network has them."""
    kind, roundness = bend
    (x1, y1), (x2, y2) = start, end
    if kind == "cubicBezier":
        rise = roundness * (y1 - y2)
        return [(x1, y1 - rise), (x2, y2 + rise)]
    angle = math.atan2(y1 - y2, x2 - x1) + (0.5 - 0.5 * roundness) * math.pi
    reach = (0.5 * roundness + 0.5) * math.dist(start, end)
    return [(x1 + reach * math.sin(angle), y1 + reach * math.cos(angle))]


def width_of(label: str) -> float:
    """The width of a node's box, about; fonts differ."""
    return _CHARACTER * len(label) + 12


# --- from tables to what is drawn ---


def _own_share(circuit: Circuit) -> pd.Series:
    """Each edge's |score| over the circuit's largest, for scores of two methods have no common unit."""
    sizes = _sizes(circuit)
    return sizes.fillna(0.0) / (sizes.max() or 1.0) if sizes.notna().any() else sizes.fillna(0.25)


def _sizes(circuit: Circuit) -> pd.Series:
    """Each edge's |score|; what is infinite, which JSON and widths cannot be, is the largest that there is."""
    return circuit.edges["score"].abs().clip(upper=float(np.finfo(np.float32).max))


def _draw(circuit: Circuit, table: pd.DataFrame, sides: dict[str, str], held: Mapping[str, str], look: Look) -> Drawing:
    """What is drawn of a table of edges; `held` has the side of each node."""
    rows = list(circuit.nodes.itertuples(index=False))
    roles, at_work = _read_roles(look.roles), _read_places(look.roles)
    places, lines, tightest, plan = _layout(rows, circuit.graph.n_heads)
    words = {side: text.rpartition(" (")[0] if side != "shared" else "in both" for side, text in sides.items()}
    nodes = []
    for row in rows:
        name, kind, role = str(row.node), str(row.kind), roles.get(str(row.node), "")
        tone = plain if kind == "head" and (plain := role.strip().lower().removesuffix(" head")) in ROLES else kind
        detail, side, layer = (look.details or {}).get(name), held.get(name), int(str(row.layer))
        hover, mark = _lines(row, role, words.get(side or ""), detail), _line(role or str(detail or ""), _MARK)
        at = at_work.get(name, "")
        nodes.append(Node(name, kind, tone, _label(name), hover, *places[name], side, layer, role, mark, at))
    shown, sure = table.head(look.max_edges), look.ensemble
    shown = shown.assign(pi=math.nan, told=None) if sure is None else with_sureness(shown, circuit, sure)
    notice = f"showing the {len(shown):,} strongest of {len(table):,} edges" if len(shown) < len(table) else ""
    with_roles, title = any(node.tone in ROLES for node in nodes), shorten(look.title or "", _NAME)
    edges, pitch = _edges(shown, nodes), plan["pitch"]
    return Drawing(title, notice, nodes, edges, lines, pitch, tightest, with_roles, sure is not None, sides, plan)


def _read_roles(roles: Roles | None) -> dict[str, str]:
    """Node -> role, of a mapping or of a table with `role` and either `node` or `layer` and `head`."""
    if roles is None:
        return {}
    if not isinstance(roles, pd.DataFrame):
        return {str(name): str(role) for name, role in roles.items()}
    if "role" not in roles or not ("node" in roles or {"layer", "head"} <= set(roles)):
        found = ", ".join(map(str, roles.columns)) or "none"
        raise SettingError(f"A table of roles needs the columns node (or layer and head) and role; it has {found}.")
    return {name: str(role) for name, role in zip(_names(roles), roles["role"], strict=True) if not pd.isna(role)}


def _read_places(roles: Roles | None) -> dict[str, str]:
    """Head -> the part of the prompt that it attends to most from END, the first token aside, where all rest."""
    if not isinstance(roles, pd.DataFrame) or not {f"attention_{part}" for part in _PLACES} <= set(roles):
        return {}
    attention = roles[[f"attention_{part}" for part in _PLACES]].fillna(0.0).to_numpy(dtype=float)
    words = list(_PLACES.values())
    return {
        name: words[row.argmax()] for name, row in zip(_names(roles), attention, strict=True) if float(row.max()) > 0
    }


def _names(roles: pd.DataFrame) -> list[str]:
    if "node" in roles:
        return roles["node"].astype(str).tolist()
    places = roles[["layer", "head"]].astype(float)  # which they are after a merge
    return [f"a{layer:.0f}.h{head:.0f}" for layer, head in places.itertuples(index=False)]


def _lines(row: Any, role: str, held: str | None, detail: str | None) -> list[str]:
    """What hovering over a node shows."""
    what = [{"mlp": "MLP"}.get(row.kind, str(row.kind))]
    if row.kind in ("head", "mlp"):
        what.append(f"layer {row.layer}")
    if role:
        what.append(f"role: {shorten(role, _NAME)}")
    if held:
        what.append(held)
    edges = f"edges: {row.in_edges:,} in, {row.out_edges:,} out"
    score = f"score {number(row.score)}" if math.isfinite(row.score) else "no score"
    lines = [shorten(str(row.node), _NAME), ", ".join(what), edges, score]
    return [*lines, shorten(str(detail), _TEXT)] if detail else lines


def _edges(table: pd.DataFrame, nodes: Sequence[Node]) -> list[Edge]:
    numbers = {node.name: i for i, node in enumerate(nodes)}
    crowd = min(1.0, len(table) / 1600) ** 0.6  # 0 for few edges, 1 for very many: then weak ones recede
    faint, thin, thick = 0.75 - 0.6 * crowd, 1.2 - 0.6 * crowd, 6.5 - 2.0 * crowd
    columns = ("sender", "receiver", "side", "weight", "share", "words", "pi", "told")
    edges = []
    for sender, receiver, side, weight, share, words, pi, told in zip(*(table[one] for one in columns), strict=True):
        node, port = split(str(receiver))
        for end in (sender, node):
            if end not in numbers:
                raise CircuitError(f"edge {sender} → {receiver}: the circuit's table of nodes has no {end!r}")
        start, end = numbers[sender], numbers[node]
        kind, roundness = bend_of(nodes[start][5:7], nodes[end][5:7], port)
        width = round(thin + (thick - thin) * share, 2)
        strength = round(max(FAINTEST, pi) if pi == pi else faint + (1 - faint) * share**0.5, 2)
        lines = [f"{shorten(sender, _NAME)} → {shorten(receiver, _NAME)}", words, *(told or [])]
        share = float(pi) if pi == pi else None
        bend = kind, round(roundness, 2)
        edges.append(Edge(start, end, port, side or port, lines, float(weight), width, strength, bend, share))
    return edges[::-1]


def bend_of(start: Place, end: Place, port: str) -> tuple[str, float]:
    """How an edge bends: an arc beside the nodes of its own column, else an S; q, k and v part ways."""
    apart = {"q": -1, "k": 1}.get(port, 0)
    if abs(end[0] - start[0]) < 40:
        return "curvedCCW", min(0.6, 60 / max(math.dist(start, end), 1)) + 0.1 + 0.07 * apart
    return "cubicBezier", 0.4 + 0.1 * apart


# --- where things stand ---


def _layout(
    nodes: Sequence[Any], n_heads: int
) -> tuple[dict[str, Place], list[dict[str, float]], float, dict[str, Any]]:
    """Layers from bottom to top (on the canvas y points down), heads by their index, then the MLP.

    Places by node, and the layers' labels, tightest factor and plan as in `Drawing`.
    """
    layers = sorted({int(node.layer) for node in nodes})
    pitch = min(max(_ROW, 540 / max(len(layers), 1)), 76.0)
    heights, y = {}, 0.0
    for i, layer in enumerate(layers):
        if i:  # layers left out show as a wider gap
            y -= pitch * (1.0 if layer == layers[i - 1] + 1 else 1.4)
        heights[layer] = y

    by_layer: dict[int, list[Any]] = {}
    for node in sorted((node for node in nodes if node.kind == "head"), key=lambda node: node.head):
        by_layer.setdefault(node.layer, []).append(node)
    gap = _CHARACTER * max((len(_label(str(node.node))) for node in nodes), default=0) + _PADDING
    columns = max(n_heads - 1, 1)
    widest = max((len(heads) for heads in by_layer.values()), default=1)
    width = max(min(1.5 * abs(y), 150.0 * columns), gap * (widest - 1)) if by_layer else 0.0
    mlp_x = width + max(gap, width / columns) if by_layer else 0.0
    mlps = [round(mlp_x + step * gap, 1) for step in _WAVE]
    middle = (max(mlps) if any(node.kind == "mlp" for node in nodes) else width) / 2

    places: dict[str, Place] = {}
    nearest = max(mlp_x - width, gap)
    for layer, heads in by_layer.items():
        xs = _spread([width * node.head / columns for node in heads], gap, width)
        nearest = min([nearest, *(right - left for left, right in pairwise(xs))])
        places |= {node.node: (x, heights[layer]) for node, x in zip(heads, xs, strict=True)}
    for node in nodes:
        if node.kind == "mlp":
            places[node.node] = (mlps[node.layer % len(mlps)], heights[node.layer] - 0.32 * pitch)
        elif node.kind != "head":
            places[node.node] = (middle, heights[node.layer])
    named = sorted({int(node.layer) for node in nodes if node.kind in ("head", "mlp")})
    rows = [{"layer": layer, "y": round(heights[layer] - 0.16 * pitch, 1)} for layer in named]
    places = {str(name): (round(x, 1), round(y, 1)) for name, (x, y) in places.items()}
    plan = {"width": round(width, 1), "columns": columns, "mlps": mlps, "pitch": round(pitch, 1)}
    return places, rows, round(min(1.0, gap / nearest), 3), plan


def _spread(wanted: Sequence[float], gap: float, width: float) -> list[float]:
    """Places in [0, width] in the given order, at least `gap` apart, each near where it is wanted."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    limit = width
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


# --- text and numbers ---


def split(receiver: str) -> tuple[str, str]:
    """`"a4.h0<q>"` → `("a4.h0", "q")`; a receiver without inputs of its own → `(name, "direct")`."""
    match = re.fullmatch(r"(.+)<([qkv])>", receiver, flags=re.DOTALL)
    return (match[1], match[2]) if match else (receiver, "direct")


def _label(name: str) -> str:
    return _line(name, _LABEL)


def _line(text: str, most: int) -> str:
    """One line of plain characters: no line breaks, no marks that turn the direction of writing."""
    return shorten(_UNFIT.sub(" ", text), most)


def _score_words(score: Any) -> str:
    if not math.isfinite(score):
        return "no score"
    return f"score {number(score)}{' (positive)' if score > 0 else ' (negative)' if score < 0 else ''}"
