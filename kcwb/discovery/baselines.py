"""What a circuit is measured against: random circuits of the same size; and an ensemble, those with its pi."""

from __future__ import annotations

from bisect import bisect_right

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.circuit import Circuit
from kcwb.errors import SettingError
from kcwb.models.graph import Graph
from kcwb.settings import Natural
from kcwb.verbs import verb


@verb
def random_circuit(graph: Graph, edges: int, seed: Natural) -> Circuit:
    """A random circuit with exactly `edges` edges, all of them on a path from `input` to `logits`.

    Edges are drawn in random order; of the longest beginning that has at most `edges` edges once its dangling ones are
    dropped, those are kept, and filled up with random edges between the nodes that are then in it.
    """
    kept = _grown(Circuit.empty(graph), edges, seed).kept
    return Circuit(graph, kept, provenance={"method": "random", "seed": seed, "edges": edges})


def _grown(start: Circuit, edges: int, seed: int) -> Circuit:
    """A random circuit that has the edges of a smaller one."""
    graph = start.graph
    if not 1 <= edges <= graph.n_edges:
        raise SettingError(f"edges={edges}: this graph has {graph.n_edges:,}; ask for 1 to that many.")
    generator = torch.Generator().manual_seed(seed % 2**63)  # a seed and the number of a draw may add up to more
    pairs = graph.exists.nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]

    def beginning(length: int) -> Circuit:
        kept = start.kept.clone()
        kept[pairs[:length, 0], pairs[:length, 1]] = True
        return Circuit(graph, kept).without_dangling()

    lengths = range(1, graph.n_edges + 1)  # of these, how many leave at most as many
    circuit = beginning(bisect_right(lengths, edges, key=lambda length: beginning(length).n_edges))
    if circuit.n_edges == 0:
        circuit = Circuit.from_edges(graph, ["input->logits"])
    while circuit.n_edges < edges:
        circuit = _filled(circuit, edges - circuit.n_edges, pairs)
    return circuit


#: A random circuit grows past these pi; between two of them it deals them out at random.
_LEVELS = (0.9, 0.75, 0.5, 0.25, 0.0)


def random_inclusion(graph: Graph, pi: Float[Tensor, " M"], seed: int) -> Float[Tensor, "S R"]:
    """The same inclusion probabilities, on random edges.

    An overlap that is weighted by pi can be compared only with one of the same weights. The surest of them are those of
    a random circuit (where all pi are 1, of `random_circuit`), which grows as they fall: at each confidence an ensemble
    is a connected circuit, and small connected circuits have more in common than as many edges of large ones.
    """
    entered, circuit = torch.full(graph.exists.shape, len(_LEVELS)), Circuit.empty(graph)
    for level, least in enumerate(_LEVELS):
        size = int((pi > least).sum())
        if size > circuit.n_edges:
            circuit = _grown(circuit, size, seed)
            entered[circuit.kept & (entered == len(_LEVELS))] = level
    edges = circuit.kept.nonzero()
    edges = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed % 2**63))]
    edges = edges[entered[*edges.T].argsort(stable=True)]
    found = torch.zeros(graph.exists.shape, dtype=pi.dtype)
    found[*edges.T] = pi.sort(descending=True).values
    return found


def _filled(circuit: Circuit, missing: int, pairs: Tensor) -> Circuit:
    """Add up to `missing` edges, in the order of `pairs`, that connect nodes on a path from `input` to `logits`.

    Where the nodes have no more edges to give, a new node is let in, with one edge in and one out; if that is one too
    many, the direct edge from `input` to `logits` makes room.
    """
    graph = circuit.graph
    inside = torch.from_numpy((circuit.node_matrix.sum(0) + circuit.node_matrix.sum(1)) > 0)
    inside[0] = inside[-1] = True
    nodes = graph.receiver_node[pairs[:, 1]]
    new = ~circuit.kept[pairs[:, 0], pairs[:, 1]]
    between = (inside[pairs[:, 0]] & inside[nodes] & new).nonzero()[:missing, 0]
    kept: Bool[Tensor, "S R"] = circuit.kept.clone()
    if len(between):
        kept[pairs[between, 0], pairs[between, 1]] = True
    else:
        into = pairs[(inside[pairs[:, 0]] & ~inside[nodes]).nonzero()[0, 0]]
        node = graph.receiver_node[into[1]]
        out = pairs[((pairs[:, 0] == node) & inside[nodes]).nonzero()[0, 0]]
        kept[into[0], into[1]] = kept[out[0], out[1]] = True
        if missing == 1:
            kept[0, -1] = False
    return Circuit(graph, kept)
