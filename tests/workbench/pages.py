"""Circuits to draw, and what the pages that are drawn of them hold."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.workbench.graph.page import GraphView, graph_view
from tests.hostile import HOSTILE

LAYERS, HEADS = 30, 9


class StandIn(Circuit):
    """What is drawn of a circuit, of any names and sizes."""

    edges: Any = None
    nodes: Any = None
    __setattr__ = object.__setattr__

    def __init__(self, edges: pd.DataFrame, nodes: pd.DataFrame, graph: Any) -> None:
        for name, value in (("edges", edges), ("nodes", nodes), ("graph", graph), ("provenance", {})):
            setattr(self, name, value)


def make_circuit(n_edges: int, seed: int = 0, n_layers: int = LAYERS, n_heads: int = HEADS) -> Any:
    """A random circuit with what `graph_view` reads of one; edges lead from earlier nodes to later ones."""
    rng = random.Random(seed)
    order = {"input": ("input", -1, -1)}
    for layer in range(n_layers):
        order |= {f"a{layer}.h{head}": ("head", layer, head) for head in range(n_heads)}
        order[f"m{layer}"] = ("mlp", layer, -1)
    order["logits"] = ("logits", n_layers, -1)
    names, scores = list(order), {}
    while len(scores) < n_edges:
        first, second = sorted(rng.sample(range(len(names)), 2))
        sender, receiver = names[first], names[second]
        if order[sender][:2] != order[receiver][:2]:
            port = f"<{rng.choice('qkv')}>" if order[receiver][0] == "head" else ""
            scores[sender, receiver + port] = rng.choice([-1, 1]) * rng.paretovariate(1.3) / 100
    rows = [(s, r, x) for (s, r), x in scores.items()]
    return stand_in(rows, order, n_layers, n_heads)


def stand_in(
    rows: list[tuple[str, str, float]],
    kinds: dict[str, tuple[str, int, int]],
    n_layers: int = LAYERS,
    n_heads: int = HEADS,
) -> Any:
    edges = pd.DataFrame(rows, columns=["sender", "receiver", "score"])
    edges = edges.sort_values("score", key=abs, ascending=False, ignore_index=True)
    ends = [(s, re.sub(r"<[qkv]>$", "", r)) for s, r, _ in rows]
    used = [name for name in kinds if any(name in pair for pair in ends)]
    table = [
        (name, *kinds[name], sum(name == r for _, r in ends), sum(name == s for s, _ in ends), 0.5) for name in used
    ]
    columns = ["node", "kind", "layer", "head", "in_edges", "out_edges", "score"]
    nodes = pd.DataFrame(table, columns=columns)
    graph = SimpleNamespace(n_layers=n_layers, n_heads=n_heads)
    return StandIn(edges, nodes, graph)


def graph_of(names: list[str]) -> Any:
    """A circuit whose heads have these names; all get edges from the input."""
    kinds = {"input": ("input", -1, -1)} | {name: ("head", i // 5, i % 5) for i, name in enumerate(names)}
    rows = [("input", f"{name}<q>", (-1) ** i / (i + 1)) for i, name in enumerate(names)]
    return stand_in(rows, kinds, n_layers=len(names) // 5 + 1, n_heads=5)


TOLD = [text for text in HOSTILE if "\0" not in text]
"""Those that a person can give as a title, a role or the like; a node's name may be any."""


def hostile_view() -> GraphView:
    texts = dict(zip(TOLD, TOLD[::-1], strict=True))
    return graph_view(graph_of(HOSTILE), roles=texts, details=texts, title=HOSTILE[1] + HOSTILE[12])


def inner(view: GraphView) -> str:
    """The page that the loader unpacks."""
    match = re.search(r'id="kc-page">([^<]+)</script>', view.page)
    assert match
    return gzip.decompress(base64.b64decode(match[1])).decode("utf-8")


def circuit_of(view: GraphView) -> dict[str, Any]:
    """All that the page is given to draw."""
    match = re.search(r'id="kc-circuit">([^<>&]+)</script>', inner(view))
    assert match
    return json.loads(match[1])


def drawn(view: GraphView, what: str) -> list[dict[str, Any]]:
    """The nodes or edges given to the instrument."""
    return about(view)[what]


def ends(edge: dict[str, Any]) -> tuple[str, ...]:
    """The names of an edge's sender and receiver, as hovering shows them."""
    return tuple(edge["lines"][0].split(" → "))


def about(view: GraphView) -> dict[str, Any]:
    """All that is drawn."""
    return circuit_of(view)["scene"]


def colours(frame: Any) -> int:
    """How many colours the canvas holds: a blank one holds one."""
    return asked(
        frame,
        """(() => {
            const canvas = shadow.querySelector("canvas");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        })()""",
    )


def asked(frame: Any, question: str, arg: Any = None) -> Any:
    """The value of an expression on a page with a graph: of `graph`, what it says of itself, `shadow`, and `arg`."""
    return frame.evaluate(f"(arg) => {{ {_HOST} return {question}; }}", arg)


def until(frame: Any, question: str, arg: Any = None) -> None:
    """Wait until such an expression is true."""
    frame.wait_for_function(f"(arg) => {{ {_HOST} return {question}; }}", arg=arg)


def faint(frame: Any) -> list[Any]:
    """Each text on a page that contrasts with what is behind it less than WCAG asks: its element, it, the contrast."""
    return asked(frame, _FAINT)


_FAINT = """(() => {
    const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const rgb = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (front, back) => [0, 1, 2].map((i) => front[i] * front[3] + back[i] * (1 - front[3]));
    const linear = (c) => (c <= 10.31475 ? c / 3294.6 : ((c / 255 + .055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
    const told = (one) => one.matches('input, select, textarea')
        || [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const seen = (one) => one.offsetWidth && !one.disabled && !one.closest('.unseen') && told(one);
    return [...shadow.querySelectorAll('*')].filter(seen).map((one) => {
        const styles = [];
        for (let at = one; at; at = at.parentElement ?? at.getRootNode().host) styles.push(getComputedStyle(at));
        const grounds = styles.map((style) => rgb(style.backgroundColor));
        const back = grounds.reduceRight((below, ground) => over(ground, below), [255, 255, 255]);
        const front = rgb(styles[0].color);
        front[3] *= styles.reduce((all, style) => all * style.opacity, 1);
        const [high, low] = [light(over(front, back)), light(back)].sort((a, b) => b - a);
        return [one.id || one.className || one.tagName, one.textContent.slice(0, 20), (high + .05) / (low + .05)];
    }).filter(([, , contrast]) => contrast < 4.5);
})()"""
_HOST = "const host = document.querySelector('.kcwb-instrument'), graph = host?.graph, shadow = host?.shadowRoot;"


def ready(frame: Any) -> Any:
    frame.wait_for_selector("#kc-canvas")
    until(frame, "graph && graph.view().frames > 0")
    frame.wait_for_timeout(100)
    return frame


def spot(frame: Any, name: str) -> dict[str, float]:
    """Where a node is on the canvas."""
    found = asked(frame, "graph.place(arg)", name)
    return {"x": found["x"], "y": found["y"]}
