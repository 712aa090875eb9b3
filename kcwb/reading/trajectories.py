"""How tokens stand on their way to the answer: the right answer and its rival, after each layer.

After each block the residual stream is read as if the model ended there, W_U . LN_final(residual): the logit lens
(nostalgebraist 2020), at END and at the subject's tokens.

A prompt is **right** if the first token of its object, or of another right answer, is the model's likeliest, else
wrong. Two tokens are followed: the right answer, of several the likeliest, and the **rival**, which is the likeliest
token but the right ones: what the model says where it is wrong, its runner-up where it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.models.network import Network
from kcwb.reading.positions import check_prompts, position_groups
from kcwb.tasks.metrics import at_end
from kcwb.tasks.prompts import KNOWN_RANK, Prompts
from kcwb.tasks.ranks import best_right_and_wrong, rank_of, rank_of_best

#: The two tokens that are followed, in the order of all axes of size 2.
WHO = ("right answer", "rival")
#: Where they are looked for; the last is the one of the subject's tokens at which each stands best.
WHERE = ("END", "subject's last token", "subject's best token")


# --- any tokens ---


def layer_streams(network: Network, tokens: Int[Tensor, "N T"]) -> list[Float[Tensor, "N T D"]]:
    """The residual stream before the first block, and after each."""
    run = forward(network, tokens, receivers=True)
    return [*(x[0] for x, _ in run.receivers), run.residual]


def standing(
    logits: Float[Tensor, "n V"], tokens: Int[Tensor, "n t"]
) -> tuple[Int[Tensor, "n t"], Float[Tensor, "n t"]]:
    """Ranks and probabilities of some tokens."""
    ranks = torch.stack([rank_of(logits, one) for one in tokens.unbind(-1)], -1)
    return ranks, logits.float().softmax(-1).gather(-1, tokens)


@torch.no_grad()
def follow(
    network: Network, streams: Sequence[Float[Tensor, "N T D"]], prompts: Prompts, tokens: Int[Tensor, "N t"],
    subject: Bool[Tensor, "N T"], step: Callable[[], object] = lambda: None,
) -> tuple[Int[Tensor, "w M N t"], Float[Tensor, "w M N t"]]:  # fmt: skip
    """Ranks and probabilities of each prompt's tokens at `WHERE`, in each of the M = L + 1 `layer_streams`.

    `subject` are the subject's positions; `step` is called after each layer.
    """
    owner, positions = subject.nonzero().unbind(-1)
    last = torch.cat([owner[1:] != owner[:-1], owner.new_ones(1, dtype=torch.bool)])
    found = []
    for residual in streams:
        end = standing(network.logits(at_end(residual, prompts)), tokens)
        there = standing(network.logits(residual[owner, positions]), tokens[owner])
        best = [_best(values, owner, len(prompts), how) for values, how in zip(there, ("amin", "amax"), strict=True)]
        found.append([torch.stack([e, t[last], b]) for e, t, b in zip(end, there, best, strict=True)])
        step()
    ranks, probabilities = (torch.stack(values, 1) for values in zip(*found, strict=True))
    return ranks, probabilities


def _best(values: Float[Tensor, "n t"], rows: Int[Tensor, " n"], n_prompts: int, how: str) -> Float[Tensor, "N t"]:
    """The smallest or largest value among each prompt's rows."""
    into = values.new_zeros(n_prompts, values.shape[1])
    return into.scatter_reduce(0, rows[:, None].expand_as(values), values, how, include_self=False)


# --- right answer and rival ---


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What the model answers, and how right answer and rival stand after each layer; made by `read_trajectories`.

    Attributes
    ----------
    tokens
        `[N, 2]`: the right answer's first token (of several the likeliest), and the rival.
    right
        `[N]`: whether a right answer is the likeliest token; ties count against it.
    ranks, probabilities
        `[w, M, N, 2]`, as `follow` has them; after the last layer they are the model's own.
    logits
        `[N, 2]`: the model's, above the mean over the vocabulary.
    max_probability, entropy
        `[N]`: of the model's answer; nats.
    """

    tokens: Int[Tensor, "N 2"]
    right: Bool[Tensor, " N"]
    ranks: Int[Tensor, "w M N 2"]
    probabilities: Float[Tensor, "w M N 2"]
    logits: Float[Tensor, "N 2"]
    max_probability: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]

    @property
    def recalled(self) -> Bool[Tensor, " N"]:
        """Whether the right answer is among the ten likeliest tokens anywhere at the subject."""
        return (self.ranks[2, :, :, 0] <= KNOWN_RANK).any(0)

    @property
    def arrival(self) -> Int[Tensor, "w N 2"]:
        """The first layer after which each is among the ten likeliest tokens; the number of layers if it never is."""
        inside = self.ranks <= KNOWN_RANK
        first = inside.int().argmax(1) - 1
        return torch.where(inside.any(1), first, self.ranks.shape[1] - 1)


@torch.no_grad()
def read_trajectories(model: Model, prompts: Prompts, step: Callable[[int], None] | None = None) -> Trajectories:
    """Read right answer and rival after each layer; `step` is called with the number of prompts after each batch.

    Raises
    ------
    DataError
        If a prompt has nothing to look at (`kcwb.reading.positions.check_prompts`).
    """
    check_prompts(prompts)
    parts = []

    def work(rows: slice) -> tuple[Tensor, ...]:
        return _read_chunk(model.network, prompts.select(rows))

    for part in by_prompts(model.network, prompts.tokens, work):
        parts.append(part)
        if step is not None:
            step(len(part[0]))
    along = (0, 0, 2, 2, 0, 0, 0)  # the axis of prompts in each field
    return Trajectories(*(torch.cat(field, axis) for field, axis in zip(zip(*parts, strict=True), along, strict=True)))


def _read_chunk(network: Network, prompts: Prompts) -> tuple[Tensor, ...]:
    """The fields of Trajectories."""
    streams = layer_streams(network, prompts.tokens)
    final = network.logits(at_end(streams[-1], prompts)).float()
    right = prompts.right[:, 0]
    tokens = best_right_and_wrong(final, right)
    logp = final.log_softmax(-1)
    return (
        tokens,
        rank_of_best(final, right) == 1,
        *follow(network, streams, prompts, tokens, position_groups(prompts)[0]),
        final.gather(-1, tokens) - final.mean(-1, keepdim=True),
        logp.max(-1).values.exp(),
        -(logp.exp() * logp).sum(-1),
    )
