"""Which edges a person means by a name: an edge's, a node's, or that of a group of nodes.

- `m0->a3.h1<q>` is one edge; `m0->a3.h1` stands for those to the head's query, key and value.
- `a3.h1` stands for all edges at the node, those into it and those out of it.
- A group stands for all edges at its nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from kcwb.errors import CircuitError, nearest, shown
from kcwb.models.graph import Graph

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit


def edges_named(graph: Graph, name: str, groups: Mapping[str, Sequence[str]], what: str) -> Bool[Tensor, "S R"]:
    """All edges of a graph that a name stands for; `groups` are their names -> their nodes.

    CircuitError, which begins with `what`, if the name is unknown (it tells the nearest), or there is no such edge.
    """
    mask = torch.zeros_like(graph.exists)
    if name not in groups and "->" in name:
        sender, _, receiver = name.partition("->")
        row = graph.sender_index(known_name(what, sender, graph.sender_names, name))
        known_name(what, receiver, {*graph.receiver_names, *graph.node_names[1:]}, name)
        mask[row, _columns(graph, receiver)] = True
        mask &= graph.exists
        if not mask.any():
            raise CircuitError(f"{what}: there is no edge {name}: {sender} is not computed before {receiver} reads.")
        return mask
    if name not in groups:
        known_name(what, name, {*graph.node_names, *groups})
    for node in groups.get(name, (name,)):
        if node != "logits":
            mask[graph.sender_index(node)] = True
        mask[:, _columns(graph, node)] = True
    return mask & graph.exists


def edges_meant(
    what: str, name: str, groups: Mapping[str, Sequence[str]], given: Circuit, now: Circuit
) -> Bool[Tensor, "S R"]:
    """The edges that a step with a name is about: `what` is `cut`, `restore` or `force`, see `kcwb.Play`.

    The circuit is as it was `given`, and as it is `now`. CircuitError if the name is unknown, or there is nothing of it
    to cut, restore or force.
    """
    graph = given.graph
    edges = edges_named(graph, name, groups, what)
    if what == "cut":
        found, words = edges & now.kept, "is cut already" if (edges & given.kept).any() else "is not in the circuit"
    elif what == "restore":
        found = edges & given.kept & ~now.kept
        words = "is not cut" if (edges & now.kept).any() else "was not in the circuit"
    else:
        if "->" not in name or name in groups:
            own = groups.get(name, (name,))
            near = torch.from_numpy(now.touched)
            near[[0, -1, *(graph.node_names.index(node) for node in own)]] = True
            edges = edges & near[:-1, None] & near[graph.receiver_node]
        found, words = edges & ~now.kept, "is in the circuit already"
    if not found.any():
        raise CircuitError(f"{what}: {shown(name)} {words}.")
    return found


def known_name(what: str, name: str, known: Collection[str], inside: str = "") -> str:
    """A name that is known; else CircuitError that tells the nearest, and what it is `inside` of."""
    if name not in known:
        told = f" in {shown(inside)}" if inside else ""
        raise CircuitError(f"{what}: {shown(name)}{told} is not known. {nearest(name[:60], known, few=12)}")
    return name


def _columns(graph: Graph, name: str) -> Bool[Tensor, " R"]:
    """The receiver of that name, or all of the node's."""
    if name in graph.node_names:
        return graph.receiver_node == graph.node_names.index(name)
    return torch.arange(graph.n_receivers) == graph.receiver_index(name)
