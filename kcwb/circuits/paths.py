"""The strongest paths of a circuit from `input` to `logits`.

The strength of a path is that of its weakest edge, by |score|; paths of equal strength are ordered by the product of
their edges' |score|, then by length. Two edges from one node to the query and the key of a head are two paths.

Exact, the strongest first, in three steps:

1. From every node, the strongest that a way from `input` to it, and from it to `logits`, can be. So every edge is known
   that is the weakest of some path.
2. Its strength is a level; levels come in descending order. The paths of a level are those along edges that are no
   weaker, with at least one edge that is as weak.
3. Of one level, the best rest of a way (by product, then length) from each node is computed backwards. With it, a
   best-first search takes no step that does not lead to a path, and finds them in order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError, nearest, shown
from kcwb.settings import Count
from kcwb.verbs import verb

#: What stands for the logarithm of a score of 0: less than that of any other.
_LOG_ZERO = -1e4


@verb
def strongest_paths(circuit: Circuit, k: Count = 10, *, through: str | None = None) -> pd.DataFrame:
    """The k paths from `input` to `logits` whose weakest edge is strongest.

    Parameters
    ----------
    circuit
        An edge without a score counts as 0. Where no edge has a score, the shortest paths come first.
    k
        How many; fewer if there are no more.
    through
        A node that all of them pass.

    Returns
    -------
    DataFrame
        One row per path, the strongest first: `path` (text, `input -> a3.h1<v> -> logits`), `edges` (their names, in
        order), `strength` (the least |score| of its edges; NaN where none has a score), `product` (of all of them) and
        `length` (how many edges).

    Raises
    ------
    CircuitError
        If the graph has no node `through`.
    """
    graph = circuit.graph
    if through is not None and through not in graph.node_names:
        raise CircuitError(f"through: {shown(through)} is no node. {nearest(through[:60], graph.node_names, few=12)}")
    edges, scored = _edges(circuit, through)
    rows = []
    for path in islice(_paths(edges, graph.n_senders), k):
        sizes = [one.size for one in path]
        rows.append(
            {
                "path": " -> ".join(["input", *(graph.receiver_names[one.column] for one in path)]),
                "edges": [graph.edge_name(one.sender, one.column) for one in path],
                "strength": min(sizes) if scored else math.nan,
                "product": math.prod(sizes) if scored else math.nan,
                "length": len(path),
            }
        )
    return pd.DataFrame(rows, columns=["path", "edges", "strength", "product", "length"])


class _Edge(NamedTuple):
    """From a node to a receiver of another; nodes by their order of computation, sizes are |scores|."""

    sender: int
    column: int
    node: int
    size: float


def _edges(circuit: Circuit, through: str | None) -> tuple[list[_Edge], bool]:
    """The kept edges in the order of their senders, without those that pass by a node; and whether any has a score."""
    graph = circuit.graph
    rows, columns = (index.tolist() for index in circuit.kept.nonzero(as_tuple=True))
    sizes = np.zeros(len(rows)) if circuit.scores is None else circuit.scores[rows, columns].double().abs().numpy()
    scored = circuit.scores is not None and not bool(np.isnan(sizes).all())
    nodes = graph.receiver_node[columns].tolist()
    edges = [_Edge(*one) for one in zip(rows, columns, nodes, np.nan_to_num(sizes).tolist(), strict=True)]
    if through is not None:  # a way that never jumps over a node in the order of computation passes it
        place = graph.node_names.index(through)
        edges = [edge for edge in edges if edge.node <= place or edge.sender >= place]
    return edges, scored


def _paths(edges: list[_Edge], last: int) -> Iterator[list[_Edge]]:
    """All paths from node 0 to the last one, the strongest first."""
    into, out = [-1.0] * (last + 1), [-1.0] * (last + 1)  # -1: there is no way
    into[0] = out[last] = math.inf
    for edge in edges:  # every edge into a node comes before those out of it
        into[edge.node] = max(into[edge.node], min(into[edge.sender], edge.size))
    for edge in reversed(edges):
        out[edge.sender] = max(out[edge.sender], min(out[edge.node], edge.size))
    weakest = {edge.size for edge in edges if edge.size <= min(into[edge.sender], out[edge.node])}
    for level in sorted(weakest, reverse=True):
        yield from _paths_of_level([edge for edge in edges if edge.size >= level], last, level)


def _paths_of_level(edges: list[_Edge], last: int, level: float) -> Iterator[list[_Edge]]:
    """All paths along some edges with at least one of size `level`, by product and length."""
    onward: dict[int, list[_Edge]] = {}
    # (node, whether an edge of the level is behind us) -> minus the logarithm of the best rest's product, its length
    rest: dict[tuple[int, bool], tuple[float, int]] = {(last, True): (0.0, 0)}
    for edge in reversed(edges):
        onward.setdefault(edge.sender, []).append(edge)
        for met in (False, True):
            there = rest.get((edge.node, met or edge.size == level))
            if there is not None:
                way = (there[0] - _log(edge.size), there[1] + 1)
                rest[edge.sender, met] = min(way, rest.get((edge.sender, met), way))
    if (0, False) not in rest:
        return
    # bound, then the way's columns (for an order among equals), then what is behind it
    heap: list[tuple[tuple[float, int], tuple[int, ...], float, bool, list[_Edge]]]
    heap = [(rest[0, False], (), 0.0, False, [])]
    while heap:
        _, columns, behind, met, path = heapq.heappop(heap)
        node = path[-1].node if path else 0
        if node == last:
            yield path
            continue
        for edge in onward.get(node, []):
            state = edge.node, met or edge.size == level
            if state in rest:
                so_far = behind - _log(edge.size)
                bound = so_far + rest[state][0], len(path) + 1 + rest[state][1]
                heapq.heappush(heap, (bound, (*columns, edge.column), so_far, state[1], [*path, edge]))


def _log(size: float) -> float:
    return math.log(size) if size > 0 else _LOG_ZERO
