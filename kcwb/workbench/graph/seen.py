"""What is seen of a circuit, without a browser: boxes and the lines between them, as `js/circuit.js` has them.

Edges that pass the filters, closed groups as one box each, what is cut and forced in, what is lit. The places are those
of `drawing`; forced nodes that the circuit has not stand where its own of their kind and layer would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kcwb.workbench.graph.drawing import Drawing, Edge, Node, Place, bend_of, control_points, split

_LAYERED_FROM = 2000  # edges


@dataclass(eq=False)
class Box:
    """A node, or a closed group of some."""

    members: list[Node]
    group: str | None
    label: str
    x: float
    y: float
    tone: str
    weight: float = 0.0
    used: bool = False  # whether an edge that is shown reaches it

    @property
    def kind(self) -> str:
        """`input`, `head`, `mlp`, `logits` or `group`."""
        return self.members[0].kind if self.group is None else "group"

    @property
    def names(self) -> list[str]:
        """Its nodes."""
        return [node.name for node in self.members]


@dataclass(eq=False)
class Link:
    """One edge, or all between two boxes."""

    names: list[str]
    start: Box
    end: Box
    edge: Edge
    width: float
    strength: float
    tone: str
    port: str
    gone: bool
    forced: bool

    def points(self, stretch: float) -> list[Place]:
        """The points of its curve, with columns brought nearer or farther."""
        start, end = ((box.x * stretch, box.y) for box in (self.start, self.end))
        bend = self.edge.bend
        if self.start.group is not None or self.end.group is not None:
            bend = bend_of((self.start.x, self.start.y), (self.end.x, self.end.y), "direct")
        return [start, *control_points(start, end, bend), end]


def seen_of(drawing: Drawing, state: Mapping[str, Any], view: Mapping[str, Any]) -> tuple[list[Box], list[Link]]:
    """Boxes and links of what a person did, by the names of the widget's traits, and looks at (`CircuitGraph.view`)."""
    nodes, edges = _with_forced(drawing, state["forced"])
    hidden, pinned, names = set(view.get("hidden", [])), set(state["pinned"]), state["names"]
    passes = [node.tone not in hidden and (not view.get("pinned_only") or node.name in pinned) for node in nodes]
    shown = [
        edge
        for edge in edges
        if passes[edge.start] and passes[edge.end] and not hidden & {edge.port, edge.tone}
        and (edge.tone == "forced" or edge.weight >= state["threshold"])
        and (edge.pi is None or edge.pi >= state["confidence"])
    ]  # fmt: skip
    boxes: list[Box] = []
    box_of: dict[int, Box] = {}
    for group, members in _closed(nodes, edges, state["groups"], view):
        inside = [i for i in members if passes[i] and i not in box_of]
        if inside:
            boxes.append(box := _boxed([nodes[i] for i in inside], group, names))
            box_of.update((i, box) for i in inside)
            if group not in state["groups"]:  # a layer: not all in one column
                box.x += 0.42 * drawing.plan["width"] * math.sin(2.4 * box.members[0].layer)
    for i, node in enumerate(nodes):
        if passes[i] and i not in box_of:
            boxes.append(_boxed([node], None, names))
            box_of[i] = boxes[-1]
    return boxes, _links(shown, nodes, box_of, set(state["cut"]))


def lit(boxes: Iterable[Box], links: Iterable[Link], state: Mapping[str, Any]) -> tuple[set[Box], set[Link]] | None:
    """What a selection, or the first path, lights; None if nothing is lit before the rest."""
    chosen = {box for box in boxes if set(box.names) <= set(state["selected"])}
    if state["paths"]:
        owner = {name: box for box in boxes for name in box.names}
        path = [owner[name] for name in state["paths"][0] if name in owner]
        steps = {(id(one), id(other)) for one, other in itertools.pairwise(path)}
        return set(path), {link for link in links if not link.gone and (id(link.start), id(link.end)) in steps}
    some = {link for link in links if link.start in chosen or link.end in chosen}
    some |= {link for link in links if set(link.names) & set(state["selected_edges"])}
    if not some and not chosen:
        return None
    return chosen | {box for link in some for box in (link.start, link.end)}, some


def _links(shown: list[Edge], nodes: list[Node], box_of: Mapping[int, Box], cut: set[str]) -> list[Link]:
    links: dict[object, Link] = {}
    for edge in shown:
        start, end, name = box_of[edge.start], box_of[edge.end], _name(edge, nodes)
        if start is end:
            continue
        gone, alone = name in cut, start.group is None and end.group is None
        key = name if alone else (id(start), id(end), gone)
        if key not in links:
            looks = edge.width, edge.strength, edge.tone, edge.port
            links[key] = Link([name], start, end, edge, *looks, gone, forced=edge.tone == "forced")
        else:
            link = links[key]
            link.names.append(name)
            link.width = min(7.0, math.hypot(link.width, edge.width))
            link.strength = max(link.strength, edge.strength)
            link.tone = link.tone if link.tone == edge.tone else "direct"
            link.port = link.port if link.port == edge.port else "direct"
            link.forced |= edge.tone == "forced"
        for box in (start, end):
            box.used, box.weight = True, max(box.weight, min(edge.weight, 1e30))
    return list(links.values())


def _closed(
    nodes: list[Node], edges: list[Edge], groups: Mapping[str, list[str]], view: Mapping[str, Any]
) -> list[tuple[str, list[int]]]:
    """Groups that are drawn as one box, with their nodes' places: a person's own, then layers of a large circuit."""
    places, opened = {node.name: i for i, node in enumerate(nodes)}, set(view.get("open", []))
    closed = {name: [places[one] for one in some if one in places] for name, some in groups.items()}
    if view.get("layered", len(edges) > _LAYERED_FROM):
        layers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            if node.kind in ("head", "mlp"):
                layers.setdefault(f"L{node.layer}", []).append(i)
        closed |= {name: some for name, some in layers.items() if len(some) > 1 and name not in closed}
    return [(name, some) for name, some in closed.items() if name not in opened]


def _boxed(members: list[Node], group: str | None, names: Mapping[str, str]) -> Box:
    x, y = (sum(getattr(node, axis) for node in members) / len(members) for axis in "xy")
    label = names.get(members[0].name) or members[0].label if group is None else f"{group} · {len(members)}"
    tones = {node.tone for node in members}
    return Box(members, group, label, x, y, "head" if len(tones) > 1 else members[0].tone)


def _name(edge: Edge, nodes: list[Node]) -> str:
    port = "" if edge.port == "direct" else f"<{edge.port}>"
    return f"{nodes[edge.start].name}->{nodes[edge.end].name}{port}"


def _with_forced(drawing: Drawing, forced: Iterable[str]) -> tuple[list[Node], list[Edge]]:
    """All nodes and edges, with those that were forced in."""
    nodes, edges = list(drawing.nodes), list(drawing.edges)
    places = {node.name: i for i, node in enumerate(nodes)}
    for name in forced:
        sender, _, receiver = name.partition("->")
        receiver, port = split(receiver)
        for end in (sender, receiver):
            if end not in places:
                places[end] = len(nodes)
                nodes.append(_placed(end, drawing))
        bend = ("cubicBezier", 0.4 + 0.1 * {"q": -1, "k": 1}.get(port, 0))
        edges.append(Edge(places[sender], places[receiver], port, "forced", [], math.inf, 2.4, 1.0, bend, None))
    return nodes, edges


def _placed(name: str, drawing: Drawing) -> Node:
    """A node that the circuit has not, where its own of that kind and layer would stand."""
    kind, layer = ("head" if name.startswith("a") else "mlp"), int(name[1:].partition(".")[0])
    plan, pitch = drawing.plan, drawing.plan["pitch"]
    known = [node for node in drawing.nodes if node.kind in ("head", "mlp")]
    y = -layer * pitch
    if known:
        near = min(known, key=lambda node: abs(node.layer - layer))
        y = near.y + (0.32 * pitch if near.kind == "mlp" else 0.0) - (layer - near.layer) * pitch
    x = plan["mlps"][layer % len(plan["mlps"])]
    if kind == "head":
        x = plan["width"] * int(name.partition(".h")[2]) / plan["columns"]
    return Node(name, kind, kind, name, [], x, y - (0.32 * pitch if kind == "mlp" else 0.0), None, layer, "", "", "")
