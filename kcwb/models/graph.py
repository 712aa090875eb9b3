"""The computation graph of a transformer: who writes to the residual stream, and who reads from it.

One convention everywhere: **rows are senders, columns are receivers**.

Senders, in the order in which they are computed (index in brackets, `H` heads, `L` layers):

- `input` [0]: the residual stream before block 0;
- `a{l}.h{h}` [1 + l(H+1) + h]: one attention head's output through W_O, without the shared bias b_O;
- `m{l}` [1 + l(H+1) + H]: one MLP's output, its bias included.

Receivers, likewise:

- `a{l}.h{h}<q>`, `<k>`, `<v>` [l(3H+1) + {0,1,2}H + h]: what a head's query, key or value reads;
- `m{l}` [l(3H+1) + 3H]: what an MLP reads;
- `logits` [L(3H+1)]: what the unembedding reads.

An edge u -> v exists when u is computed before v reads. Heads of one layer do not feed each other; `m{l}` reads the
heads of its own layer in a sequential block and does not in a parallel one (GPT-NeoX). Under grouped-query attention
keys and values are receivers per *query* head, as in Knowledge Circuits (arXiv 2405.17969), EAP-IG and MIB, so that
counts agree with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kcwb.errors import CircuitError
from kcwb.verbs import noun

#: Entries of the largest mask that a file may ask for; Llama's 70 billion weights have 80 million.
_LARGEST = 2**27


class Node(NamedTuple):
    """A node's place in the model: kind is `input`, `head`, `mlp` or `logits`; `head` is -1 where there is none."""

    kind: str
    layer: int
    head: int


@noun
@dataclass(frozen=True)
class Graph:
    """The graph of a transformer with `n_layers` layers of `n_heads` heads.

    Parameters
    ----------
    n_layers, n_heads
        The model's size; `n_heads` counts query heads.
    parallel
        True when attention and MLP of a layer read the same residual stream (GPT-NeoX, GPT-J, Phi).
    """

    n_layers: int
    n_heads: int
    parallel: bool = False

    @classmethod
    def of_file(cls, n_layers: Any, n_heads: Any, parallel: Any = False) -> Graph:
        """The graph that a file describes; CircuitError unless it has a size that a model can have."""
        for name, value in (("n_layers", n_layers), ("n_heads", n_heads)):
            if type(value) is not int or value < 1:
                raise CircuitError(f"{name}: expected a whole number from 1 on, found {value!r:.60}.")
        if not isinstance(parallel, bool):
            raise CircuitError(f"parallel: expected true or false, found {parallel!r:.60}.")
        graph = cls(n_layers, n_heads, parallel)
        if graph.n_senders * graph.n_receivers > _LARGEST:
            raise CircuitError(f"size: no model has {n_layers!r:.20} layers of {n_heads!r:.20} heads.")
        return graph

    @property
    def n_senders(self) -> int:
        """The number of rows."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_receivers(self) -> int:
        """The number of columns."""
        return self.n_layers * (3 * self.n_heads + 1) + 1

    @cached_property
    def n_edges(self) -> int:
        """The number of edges that exist."""
        return int(self.exists.sum())

    def head_senders(self, layer: int) -> slice:
        """The rows of a layer's heads."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp_sender(self, layer: int) -> int:
        """The row of a layer's MLP."""
        return (layer + 1) * (self.n_heads + 1)

    def attention_receivers(self, layer: int) -> slice:
        """The columns of a layer's heads: all queries, then all keys, then all values."""
        start = layer * (3 * self.n_heads + 1)
        return slice(start, start + 3 * self.n_heads)

    def mlp_receiver(self, layer: int) -> int:
        """The column of a layer's MLP."""
        return layer * (3 * self.n_heads + 1) + 3 * self.n_heads

    def senders_before(self, receiver: int) -> int:
        """How many of the first senders a receiver reads: its column of `exists` is True exactly for those rows."""
        layer, place = divmod(receiver, 3 * self.n_heads + 1)
        before = 1 + layer * (self.n_heads + 1)
        return before + (self.n_heads if place == 3 * self.n_heads and not self.parallel else 0)

    @cached_property
    def sender_names(self) -> tuple[str, ...]:
        """The names of the rows."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @cached_property
    def receiver_names(self) -> tuple[str, ...]:
        """The names of the columns."""
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{letter}>" for letter in "qkv" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return (*names, "logits")

    @cached_property
    def node_names(self) -> tuple[str, ...]:
        """The names of the nodes: every sender, then `logits`."""
        return (*self.sender_names, "logits")

    @cached_property
    def exists(self) -> Bool[Tensor, "S R"]:
        """Which edges exist."""
        before = torch.tensor([self.senders_before(receiver) for receiver in range(self.n_receivers)])
        return torch.arange(self.n_senders)[:, None] < before[None, :]

    @cached_property
    def receiver_node(self) -> Int[Tensor, "R"]:
        """The node that a receiver belongs to, as an index into `node_names`."""
        index = {name: i for i, name in enumerate(self.node_names)}
        return torch.tensor([index[name.partition("<")[0]] for name in self.receiver_names])

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.sender_names)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.receiver_names)}

    def sender_index(self, name: str) -> int:
        """The row of a sender's name; CircuitError if there is none."""
        if name not in self._rows:
            raise CircuitError(f"{name!r} is not a sender of {self}; senders are input, a<layer>.h<head>, m<layer>.")
        return self._rows[name]

    def receiver_index(self, name: str) -> int:
        """The column of a receiver's name; CircuitError if there is none."""
        if name not in self._columns:
            raise CircuitError(
                f"{name!r} is not a receiver of {self}; receivers are a<layer>.h<head><q|k|v>, m<layer>, logits."
            )
        return self._columns[name]

    def edge_index(self, name: str) -> tuple[int, int]:
        """(row, column) of an edge named `sender->receiver`; CircuitError if the graph has no such edge."""
        sender, arrow, receiver = name.partition("->")
        if not arrow:
            raise CircuitError(f"{name!r} is not an edge; edges are written sender->receiver, as in input->a0.h0<q>.")
        row, column = self.sender_index(sender), self.receiver_index(receiver)
        if not self.exists[row, column]:
            raise CircuitError(f"{self} has no edge {name!r}: {sender} is not computed before {receiver} reads.")
        return row, column

    def edge_name(self, row: int, column: int) -> str:
        """The name of an edge, `sender->receiver`."""
        return f"{self.sender_names[row]}->{self.receiver_names[column]}"

    def node(self, name: str) -> Node:
        """The place of a node; layer -1 for `input`, `n_layers` for `logits`; CircuitError if there is none."""
        if name in ("input", "logits"):
            return Node(name, -1 if name == "input" else self.n_layers, -1)
        if name not in self._rows:
            raise CircuitError(f"{name!r} is not a node of {self}.")
        layer, place = divmod(self._rows[name] - 1, self.n_heads + 1)
        return Node("mlp", layer, -1) if place == self.n_heads else Node("head", layer, place)

    def __str__(self) -> str:
        """Sizes in words, for messages."""
        block = ", parallel blocks" if self.parallel else ""
        return f"the graph of {self.n_layers} layers with {self.n_heads} heads{block}"
