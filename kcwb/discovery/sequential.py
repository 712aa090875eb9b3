"""ACDC's definition: which edges it visits, in which order, and what it finds.

Source: ACDC (arXiv 2304.14997), as Knowledge Circuits uses it (arXiv 2405.17969).

1. Start from the full graph, M_cur = M(G).
2. Visit receivers from the output to the input: `logits`; then for each layer from the last: `m{l}`; then its heads
   from the last, each `<v>`, `<k>`, `<q>`.
3. A receiver whose node has no kept outgoing edge loses all its incoming edges unevaluated.
4. Otherwise visit its senders from the latest to the earliest: M_new = M(G without e). If M_new - M_cur < tau (or its
   absolute value), cut e and set M_cur = M_new; else keep e.

The order is part of the result: another order gives another circuit. The heads of a layer have no order by nature, so
that it can be drawn (`layer_order`). The definition as it stands, with a run of the whole circuit for every edge, is
the oracle of the tests (`tests/discovery/sequential.py`); what finds the same faster is `kcwb.discovery.acdc`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.models.graph import Graph

#: An increase this close to tau may fall on either side in another order of summation.
NEAR_TIE = 1e-5


class Pruned(NamedTuple):
    """What ACDC finds.

    Attributes
    ----------
    kept
        `[S, R]`: the edges that stay.
    increases
        `[S, R]`: M_new - M_cur when the edge was visited; NaN where it was not evaluated.
    loss
        The circuit's loss.
    evaluations, near_ties
        How often a circuit was run, and how many increases lay within `NEAR_TIE` of tau.
    """

    kept: Bool[Tensor, "S R"]
    increases: Float[Tensor, "S R"]
    loss: float
    evaluations: int
    near_ties: int


def layer_order(graph: Graph, seed: int | None = None) -> Int[Tensor, "L H"]:
    """The heads of each layer in the order in which ACDC visits them: from the last, or drawn from a seed."""
    if seed is None:
        return torch.arange(graph.n_heads).flip(0).expand(graph.n_layers, -1)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(graph.n_heads, generator=generator) for _ in range(graph.n_layers)])


def receiver_order(graph: Graph, seed: int | None = None) -> list[int]:
    """The columns in the order in which ACDC visits them."""
    order, heads = [graph.n_receivers - 1], layer_order(graph, seed)
    for layer in reversed(range(graph.n_layers)):
        order.append(graph.mlp_receiver(layer))
        start = graph.attention_receivers(layer).start
        for head in heads[layer].tolist():
            order += [start + kind * graph.n_heads + head for kind in (2, 1, 0)]
    return order


def sender_order(graph: Graph, seed: int | None = None) -> Int[Tensor, " S"]:
    """The rows in the order in which ACDC visits those that a receiver reads: from the latest to the earliest."""
    order, heads = torch.arange(graph.n_senders).flip(0), layer_order(graph, seed)
    for layer in range(graph.n_layers):
        first = graph.sender_index(f"a{layer}.h0")
        where = graph.n_senders - first - graph.n_heads
        order[where : where + graph.n_heads] = first + heads[layer]
    return order
