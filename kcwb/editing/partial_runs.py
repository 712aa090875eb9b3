"""Passes that a change of one MLP's output makes necessary, and no more.

A change of what the MLP of layer l* writes at one position is felt by nothing before that layer and, in a causal model,
by no earlier position. `Tail` runs the model once, keeps what cannot change (the stream after layer l*, the keys and
values of earlier positions), and then runs only the rest, as often as an optimiser asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.errors import DataError
from kcwb.interventions.block import KeysValues, run_block, run_blocks
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.models.network import Network
from kcwb.tasks.relations import Fact
from kcwb.tasks.tokens import encode_one, padded


class Rows(NamedTuple):
    """Prompts with the answers that they are to get, right-padded.

    Attributes
    ----------
    tokens
        `[N, T]`: a prompt, then its answer's tokens but the last.
    lengths
        `[N]`: the real tokens of each row.
    subjects
        `[N]`: the position of the subject's last token.
    positions, answers, mask
        `[N, A]`: where each answer token is predicted (padding repeats END), the tokens, and which are not padding.
    """

    tokens: Int[Tensor, "N T"]
    lengths: Int[Tensor, " N"]
    subjects: Int[Tensor, " N"]
    positions: Int[Tensor, "N A"]
    answers: Int[Tensor, "N A"]
    mask: Float[Tensor, "N A"]


def make_rows(model: Model, asked: Sequence[tuple[Fact, str]]) -> Rows:
    """Tokens of (fact, template) pairs; DataError if one does not fit into the model's context."""
    rows = [encode_one(model, fact, template) for fact, template in asked]
    lists = [row.prompt + row.answer[:-1] for row in rows]
    width = max(map(len, lists))
    if width > model.network.n_ctx:
        raise DataError(f"A prompt has {width} tokens with its answer; {model.name} reads {model.network.n_ctx}.")
    pad, column = partial(padded, device=model.device), partial(torch.tensor, device=model.device)
    mask = pad([[1] * len(row.answer) for row in rows])
    last = column([len(row.prompt) - 1 for row in rows])
    return Rows(
        tokens=pad(lists),
        lengths=column([len(row) for row in lists]),
        subjects=column([row.stop - 1 for row in rows]),
        positions=last[:, None] + torch.arange(mask.shape[1], device=model.device) * mask,
        answers=pad([row.answer for row in rows]),
        mask=mask.float(),
    )


class Place(NamedTuple):
    """One layer at one position of each row: the down-projection's input, the MLP's output, the stream after it."""

    key: Float[Tensor, "N M"]
    output: Float[Tensor, "N D"]
    after: Float[Tensor, "N D"]


@torch.no_grad()
def read_places(
    network: Network,
    tokens: Int[Tensor, "N T"],
    at: Int[Tensor, " N"],
    layers: Sequence[int],
    deltas: Mapping[int, Float[Tensor, "M D"]] | None = None,
) -> dict[int, Place]:
    """What some layers do at one position of each row, the down-projections being changed by `deltas`."""
    changed = {layer: delta.to(network.dtype) for layer, delta in (deltas or {}).items()}

    def work(part: slice) -> dict[int, Place]:
        found, x, places = {}, network.embed(tokens[part]), at[part]
        rows = torch.arange(len(x), device=x.device)
        for layer in range(max(layers) + 1):
            block = run_block(network, layer, x)
            x = block.after + block.hidden @ changed[layer] if layer in changed else block.after
            if layer in layers:
                key = block.hidden[rows, places]
                output = network.mlp_output(layer, key)
                output = output + key @ changed[layer] if layer in changed else output
                found[layer] = Place(key, output, x[rows, places])
        return found

    parts = [*by_prompts(network, tokens, work)]
    return {layer: Place(*map(torch.cat, zip(*(part[layer] for part in parts), strict=True))) for layer in parts[0]}


@dataclass(frozen=True, eq=False)
class Tail:
    """What is left to compute when an MLP's output changes from some position on; made by `make_tail`.

    Attributes
    ----------
    network
        The model.
    positions
        `[N, Q]`: the positions that are run anew, each row's own; those beyond a row's end are padding.
    hidden
        `[N, Q, M]`: the input of the MLP's down-projection there.
    after
        `[N, Q, D]`: the stream after the layer there, unchanged.
    kept
        Per later layer the keys and values, each `[H, N, T, K]`, of the unchanged run.
    """

    network: Network
    positions: Int[Tensor, "N Q"]
    hidden: Float[Tensor, "N Q M"]
    after: Float[Tensor, "N Q D"]
    kept: Mapping[int, KeysValues]

    def run(self, change: Float[Tensor, "N Q D"]) -> Float[Tensor, "N Q D"]:
        """The final residual stream when `change` is added to the MLP's output."""
        x = self.after + change
        for layer, kept in self.kept.items():
            x = run_block(self.network, layer, x, self.positions, kept).after
        return x


@torch.no_grad()
def make_tail(network: Network, rows: Rows, layer: int, start: Int[Tensor, " N"]) -> Tail:
    """Run the prompts once, and keep what a change of a layer's MLP output from `start` on leaves as it is."""
    width = int((rows.lengths - start).max())
    tokens = torch.nn.functional.pad(rows.tokens, (0, max(0, int(start.max()) + width - rows.tokens.shape[1])))
    if tokens.shape[1] > network.n_ctx:
        raise DataError(f"The prompts are too long: {tokens.shape[1]} positions; the model reads {network.n_ctx}.")
    positions = start[:, None] + torch.arange(width, device=start.device)
    index = torch.arange(len(tokens), device=start.device)[:, None], positions
    blocks = run_blocks(network, tokens)
    own = next(itertools.islice(blocks, layer, None))
    hidden, after = own.hidden[index], own.after[index]
    kept = {number: (block.keys, block.values) for number, block in enumerate(blocks, start=layer + 1)}
    return Tail(network, positions, hidden, after, kept)


def answer_logits(network: Network, tail: Tail, final: Float[Tensor, "N Q D"], rows: Rows) -> Float[Tensor, "N A V"]:
    """Logits where the rows' answers are predicted, from a tail's final stream."""
    columns = rows.positions - tail.positions[: len(rows.positions), :1]
    return network.logits(final[torch.arange(len(columns), device=final.device)[:, None], columns])


def answer_nll(logits: Float[Tensor, "N A V"], rows: Rows) -> Float[Tensor, " N"]:
    """Minus the mean log-probability of each row's answer tokens, nats."""
    logs = logits.float().log_softmax(-1).gather(-1, rows.answers[..., None])[..., 0]
    return -(logs * rows.mask).sum(-1) / rows.mask.sum(-1)


@torch.no_grad()
def measured_nll(model: Model, rows: Rows) -> Float[Tensor, " N"]:
    """The loss of each row's answer by the model's weights as they are now."""

    def work(part: slice) -> Tensor:
        some = Rows(*(values[part] for values in rows))
        residual = forward(model.network, some.tokens).residual
        index = torch.arange(len(residual), device=residual.device)[:, None], some.positions
        return answer_nll(model.network.logits(residual[index]), some)

    return torch.cat([*by_prompts(model.network, rows.tokens, work)])
