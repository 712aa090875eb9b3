"""Many sets of heads at once: the model's answers without each of them, or with each of them weaker or stronger.

The outputs of a set's heads are set to zero at every position, as Knowledge Circuits (arXiv 2405.17969) ablates heads,
or multiplied by a factor. Zero is the run of the full graph in which all edges out of those heads are cut
(`kcwb.interventions.nodes.ablate_nodes`), done for a hundred sets in the time of a few:

1. One clean run gives the residual stream before each layer. A batch of sets begins at the first layer in which any of
   them has a head.
2. Prompts that begin alike, with the same demonstrations, run what they share once for each set and not once for each
   prompt: a causal model's tokens do not feel what comes after them.
3. Nothing after END is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.interventions.block import run_block
from kcwb.models.loading import Model
from kcwb.models.memory import in_pieces
from kcwb.models.network import Network
from kcwb.progress import Progress, track
from kcwb.reading.dla import named_heads
from kcwb.reading.trajectories import layer_streams
from kcwb.tasks.metrics import together
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.ranks import rank_of_best

_ROWS, _LOGITS = 2**12, 2**24  # tokens, and logits, of a batch of ablated runs


@torch.no_grad()
def answers_without(
    model: Model,
    prompts: Prompts,
    sets: Sequence[Sequence[str]],
    groups: Sequence[int] | None = None,
    *,
    factors: Sequence[float] | None = None,
    progress: Progress = True,
) -> tuple[Int[np.ndarray, "sets N"], Float[np.ndarray, "sets N"]]:
    """The answers of the full model when the outputs of sets of heads are zero, or scaled, at every position.

    Many sets run at once, from the first layer that any of them has a head in. Prompts of a group share their first
    tokens (a set of demonstrations and the beginning of the question), which are run once for each set of heads, not
    once for each prompt. Where a norm follows the attention, a head's share of the normed sum is what is taken away.

    Parameters
    ----------
    model, prompts
        What is asked.
    sets
        Names of heads; an empty set leaves the model intact.
    groups
        Which prompts begin alike; None for a single group. Grouping changes the speed alone.
    factors
        What each set's outputs are multiplied by; None for 0, which takes them out.
    progress
        Reported per set.

    Returns
    -------
    tuple
        `[sets, N]`: the rank of the answer's first token, from 1; and minus its log-probability (nats). Of several
        right answers the best rank, against which the others do not count, and that of their summed probability.
    """
    places = [[(one.layer, one.head) for one in named_heads(model, heads)] for heads in sets]
    late = model.graph.n_layers
    order = sorted(range(len(sets)), key=lambda i: min((layer for layer, _ in places[i]), default=late))
    by = [0.0] * len(sets) if factors is None else list(factors)
    ranks = np.zeros((len(sets), len(prompts)), dtype=np.int64)
    losses = np.zeros((len(sets), len(prompts)))
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups if groups is not None else [0] * len(prompts)):
        rows_of.setdefault(group, []).append(row)
    with track(progress, len(sets) * len(rows_of), "ablation") as step:
        for rows in rows_of.values():
            group = _group(model.network, prompts.select(rows))

            def work(part: slice, group: _Group = group, rows: list[int] = rows) -> None:
                some = order[part]
                residual = _scaled(model.network, group, [places[i] for i in some], [by[i] for i in some])
                logits = model.network.logits(residual).float()
                right = group.prompts.right[:, 0].expand(len(some), -1, -1)
                ranks[np.ix_(some, rows)] = rank_of_best(logits, right).cpu().numpy()
                losses[np.ix_(some, rows)] = (logits.logsumexp(-1) - together(logits, right)).cpu().numpy()
                step(len(some))

            for _ in in_pieces(len(order), group.batch, work):
                pass
    return ranks, losses


class _Group(NamedTuple):
    """Prompts that begin with the same P tokens, and the clean residual stream before each layer."""

    prompts: Prompts
    prefix: list[Float[Tensor, "P D"]]
    suffix: list[Float[Tensor, "N Q D"]]
    batch: int


def _group(network: Network, prompts: Prompts) -> _Group:
    longest = int(prompts.lengths.max())
    tokens = prompts.tokens[:, :longest]
    alike = (tokens == tokens[:1]).all(0).int().cumprod(0)
    n_prefix = min(int(alike.sum()), int(prompts.lengths.min()) - 1)
    streams = layer_streams(network, tokens)[:-1]
    n_rows = n_prefix + len(prompts) * (longest - n_prefix)
    batch = max(1, min(_ROWS // n_rows, _LOGITS // (len(prompts) * network.d_vocab)))
    return _Group(prompts, [x[0, :n_prefix] for x in streams], [x[:, n_prefix:] for x in streams], batch)


def _scaled(
    network: Network, group: _Group, sets: Sequence[Sequence[tuple[int, int]]], factors: Sequence[float]
) -> Float[Tensor, "c N D"]:
    """The final residual stream at END with the outputs of each set of (layer, head) times its factor."""
    first = min((layer for heads in sets for layer, _ in heads), default=network.graph.n_layers - 1)
    x = group.prefix[first].expand(len(sets), 1, -1, -1)
    y = group.suffix[first].expand(len(sets), -1, -1, -1)
    n_prefix, n_prompts = x.shape[2], y.shape[1]
    at = torch.arange(n_prefix, n_prefix + y.shape[2], device=y.device)
    for layer in range(first, network.graph.n_layers):
        changed = [(head, i) for i, heads in enumerate(sets) for of, head in heads if of == layer]

        def scaled(outputs: Tensor, changed: list[tuple[int, int]] = changed) -> Tensor:
            for head, i in changed:
                outputs[head, i] *= factors[i]
            return outputs

        early = run_block(network, layer, x, heads=scaled)
        y = run_block(network, layer, y, at, (early.keys, early.values), scaled).after
        x = early.after
    ends = group.prompts.ends - n_prefix
    return y[:, torch.arange(n_prompts, device=y.device), ends]
