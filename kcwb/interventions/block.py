"""One transformer block, on the whole residual stream or on some positions of it: what every partial re-run is made of.

Where only some positions are run anew, the keys and values of the others are kept from an earlier run
(`kept`), since a causal model's earlier positions do not feel what changes behind them:

1. queries, keys and values of the positions at hand;
2. the new keys and values take their places among the kept ones;
3. heads' outputs, which `heads` may replace;
4. the MLP, on what is then in the stream (in a parallel block, on what was there before).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, cat

from kcwb.models.network import Network

KeysValues = tuple[Float[Tensor, "H *any T K"], Float[Tensor, "H *any T K"]]


class Block(NamedTuple):
    """What one block leaves behind: the stream after it, its MLP's hidden activations, its heads' keys and values."""

    after: Float[Tensor, "*any Q D"]
    hidden: Float[Tensor, "*any Q M"]
    keys: Float[Tensor, "H *any T K"]
    values: Float[Tensor, "H *any T K"]


def run_block(
    network: Network,
    layer: int,
    x: Float[Tensor, "*any Q D"],
    positions: Int[Tensor, "*N Q"] | None = None,
    kept: KeysValues | None = None,
    heads: Callable[[Float[Tensor, "H *any Q D"]], Float[Tensor, "H *any Q D"]] | None = None,
) -> Block:
    """One block, every edge kept.

    Parameters
    ----------
    network, layer
        The model, and which of its blocks.
    x
        The residual stream before it: `[N, Q, D]`, with candidate axes before these where there are any.
    positions
        Where in the prompts `x` is; None for 0, 1, ... Each prompt's own, `[N, Q]`, or `[Q]` for all alike.
    kept
        Keys and values of positions 0, 1, ...; those at `positions` are new. If all prompts have the same `positions`,
        these follow the kept ones. Axes of candidates or prompts may have length 1. None: `x` is all there is.
    heads
        Gets the heads' outputs, without the shared bias, and returns (or changes in place) what they write instead.
    """
    q, k = network.queries(layer, x[None], positions=positions), network.keys(layer, x[None], positions=positions)
    v = network.values(layer, x[None])
    if kept is not None and positions is not None:
        k, v = _placed(kept[0], k, positions), _placed(kept[1], v, positions)
    outputs = network.head_outputs(layer, q, k, v, positions=positions)
    outputs = outputs if heads is None else heads(outputs)
    middle = x + outputs.sum(0) + network.constant(layer)
    hidden = network.mlp_hidden(layer, x if network.graph.parallel else middle)
    return Block(middle + network.mlp_output(layer, hidden), hidden, k, v)


def run_blocks(network: Network, tokens: Int[Tensor, "N T"], many: int | None = None) -> Iterator[Block]:
    """The first blocks of the full model on some prompts, one after the other (None: all)."""
    x = network.embed(tokens)
    for layer in range(network.graph.n_layers if many is None else many):
        block = run_block(network, layer, x)
        x = block.after
        yield block


def _placed(
    kept: Float[Tensor, "H *any T K"], new: Float[Tensor, "H *any Q K"], positions: Int[Tensor, "*N Q"]
) -> Float[Tensor, "H *any T K"]:
    """The kept keys or values with the new ones in their places, or behind them."""
    whole = kept.expand(*new.shape[:-2], *kept.shape[-2:])
    if positions.ndim == 1:
        return cat([whole, new], -2)
    return whole.scatter(-2, positions[..., None].expand(new.shape), new)
