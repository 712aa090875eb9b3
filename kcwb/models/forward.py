"""One pass through the graph, with any of its edges cut.

Every receiver r of the graph reads

    x_r = constant + sum_u (kept[u, r] ? a_u : abl_u)
        = (constant + sum_u abl_u) + sum_u kept[u, r] (a_u - abl_u)

where a_u is the sender's current output and abl_u its ablated one. The second line is how it is computed: for all
receivers of a layer at once, one matrix product between the mask and the stacked differences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.models.network import Network


class Pass(NamedTuple):
    """What a pass leaves behind.

    Attributes
    ----------
    residual
        `[N, T, D]`, what the unembedding reads; `network.logits(residual)` are the logits.
    senders
        `[S, N, T, D]`, every sender's output; empty unless asked for.
    receivers
        Per layer the inputs of its queries, keys and values `[3H, N, T, D]` and of its MLP `[N, T, D]`; empty
        unless asked for.
    """

    residual: Float[Tensor, "N T D"]
    senders: Float[Tensor, "S N T D"]
    receivers: list[tuple[Tensor, Tensor]]


def forward(
    network: Network,
    tokens: Int[Tensor, "N T"],
    *,
    kept: Bool[Tensor, "S R"] | None = None,
    ablated: Float[Tensor, "S N T D"] | None = None,
    embedding: Float[Tensor, "N T D"] | None = None,
    first: int = 0,
    attention: bool = True,
    senders: bool = False,
    receivers: bool = False,
) -> Pass:
    """Run the network with only the edges `kept` delivering their senders' current output.

    Parameters
    ----------
    network
        The transformer as functions of nodes.
    tokens
        Token ids, right-padded where prompts differ in length (a causal model never looks right).
    kept
        Which edges deliver; None for all of them. A pass with a mask carries no gradients.
    ablated
        What the cut edges deliver; None for zero. Not read when `kept` is None.
    embedding
        Use this as the output of `input` instead of the tokens' embedding; or as the residual stream where to begin.
    first, attention
        The layer to begin with, and whether with its attention or, in a sequential block, with its MLP: what lies
        behind some node, without a mask. `receivers` then has fewer layers, and no inputs of the heads passed over.
    senders, receivers
        Record the senders' outputs and the receivers' inputs. Recorded tensors that are part of a gradient's graph
        can be differentiated by (`torch.autograd.grad`).

    Returns
    -------
    Pass
        The final residual stream and what was recorded.
    """
    graph = network.graph
    current = (network.embed(tokens) if embedding is None else embedding)[None]
    stream = _Stream(receivers) if kept is None else _CutStream(kept, ablated, current)
    outputs, inputs = [], []

    def write(output: Tensor, constant: Tensor | float = 0.0) -> None:
        stream.write(output, constant)
        if senders:
            outputs.append(output)

    write(current)
    for layer in range(first, graph.n_layers):
        column = graph.mlp_receiver(layer)
        if attention or layer > first:
            x = stream.read(graph.attention_receivers(layer))
            q, k, v = x.chunk(3) if x.shape[0] > 1 else (x, x, x)
            qkv = network.queries(layer, q), network.keys(layer, k), network.values(layer, v)
            heads = network.head_outputs(layer, *qkv)
            if graph.parallel:
                y = stream.read(slice(column, column + 1))[0]
                write(heads, network.constant(layer))
            else:
                write(heads, network.constant(layer))
                y = stream.read(slice(column, column + 1))[0]
        else:
            y = stream.read(slice(column, column + 1))[0]
            x = y[None][:0]
        write(network.mlp(layer, y)[None])
        if receivers:
            inputs.append((x, y))
    residual = stream.read(slice(graph.n_receivers - 1, graph.n_receivers))[0]
    return Pass(residual, torch.cat(outputs) if senders else residual.new_empty(0), inputs)


class _Stream:
    """The residual stream with every edge kept: all receivers of a layer read the same sum."""

    def __init__(self, apart: bool) -> None:
        self._apart = apart  # give each receiver its own copy, so that each has its own gradient
        self._sum: Any = 0.0  # something is always written before it is read

    def write(self, outputs: Float[Tensor, "s N T D"], constant: Tensor | float) -> None:
        self._sum = self._sum + outputs.sum(0) + constant

    def read(self, columns: slice) -> Float[Tensor, "r N T D"]:
        return self._sum.expand(columns.stop - columns.start if self._apart else 1, *self._sum.shape)


class _CutStream:
    """The residual stream as each receiver sees it through a mask."""

    def __init__(self, kept: Bool[Tensor, "S R"], ablated: Float[Tensor, "S N T D"] | None, like: Tensor) -> None:
        self._kept, self._ablated, self._shape = kept.to(like.device), ablated, like.shape[1:]
        self._base = like.new_zeros(self._shape)
        self._differences: Float[Tensor, "S NTD"] = like.new_empty(len(kept), self._shape.numel())
        self._written = 0

    @torch.no_grad()
    def write(self, outputs: Float[Tensor, "s N T D"], constant: Tensor | float) -> None:
        rows = slice(self._written, self._written + outputs.shape[0])
        if self._ablated is not None:
            ablated = self._ablated[rows]
            self._base = self._base + ablated.sum(0)
            outputs = outputs - ablated
        self._base = self._base + constant
        self._differences[rows] = outputs.flatten(1)
        self._written = rows.stop

    @torch.no_grad()
    def read(self, columns: slice) -> Float[Tensor, "r N T D"]:
        weights = self._kept[: self._written, columns].T.to(self._differences.dtype)
        return (weights @ self._differences[: self._written]).unflatten(1, self._shape) + self._base
