"""What a model answers, and how the right answer and its rival stand on the way.

A prompt is **right** if the first token of its object is the model's likeliest, else wrong. Two tokens are followed:
the right answer, and the **rival**, which is the likeliest token but the right one: what the model says where it is
wrong, its runner-up where it is right. Both are read with the logit lens of `kcwb.reading.lens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.models.forward import forward, prompt_chunks
from kcwb.models.loading import Model
from kcwb.reading.positions import check_prompts, position_groups
from kcwb.tasks.prompts import KNOWN_RANK, Prompts
from kcwb.tasks.ranks import rank_of

#: The two tokens that are followed, in the order of all axes of size 2.
WHO = ("right answer", "rival")
#: Where they are looked for; the last is the one of the subject's tokens at which each stands best.
WHERE = ("END", "subject's last token", "subject's best token")


@dataclass(frozen=True, eq=False)
class Readings:
    """What the model answers, and how the right answer and its rival stand after each layer; made by `read_answers`.

    Attributes
    ----------
    tokens
        `[N, 2]`: the right answer's first token, and the rival.
    right
        `[N]`: whether the right answer is the likeliest token; ties count against it.
    ranks, probabilities
        `[w, M, N, 2]`: at each of `WHERE`, after each of M = L + 1 layers (the first is the embedding alone, the last
        the model's own answer).
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
def read_answers(model: Model, prompts: Prompts, step: Callable[[int], None] | None = None) -> Readings:
    """Read right answer and rival after each layer; `step` is called with the number of prompts after each batch.

    Raises
    ------
    DataError
        If a prompt has nothing to look at (`kcwb.reading.positions.check_prompts`).
    """
    check_prompts(prompts)
    parts = []
    for rows in prompt_chunks(model.network, prompts.tokens):
        part = prompts.select(range(len(prompts))[rows])
        parts.append(_read_chunk(model, part))
        if step is not None:
            step(len(part))
    tokens, right, ranks, probabilities, logits, top, entropy = zip(*parts, strict=True)
    return Readings(
        torch.cat(tokens),
        torch.cat(right),
        torch.cat(ranks, dim=2),
        torch.cat(probabilities, dim=2),
        torch.cat(logits),
        torch.cat(top),
        torch.cat(entropy),
    )


def _read_chunk(model: Model, prompts: Prompts) -> tuple[Tensor, ...]:
    """The fields of Readings."""
    network = model.network
    run = forward(network, prompts.tokens, receivers=True)
    assert run.receivers is not None  # asked for in the line above
    rows = torch.arange(len(prompts), device=model.device)
    final = network.logits(run.residual[rows, prompts.ends]).float()
    gold = prompts.answers[:, 0]
    rival = final.scatter(-1, gold[:, None], -math.inf).argmax(-1)
    tokens = torch.stack([gold, rival], -1)
    logp = final.log_softmax(-1)
    subject, positions = position_groups(prompts)[0].nonzero().unbind(-1)
    last = torch.cat([subject[1:] != subject[:-1], subject.new_ones(1, dtype=torch.bool)])
    ranks, probabilities = [], []
    for residual in [*(x[0] for x, _ in run.receivers), run.residual]:
        end = _standing(network.logits(residual[rows, prompts.ends]), tokens)
        there = _standing(network.logits(residual[subject, positions]), tokens[subject])
        best = [_best(values, subject, len(prompts), how) for values, how in zip(there, ("amin", "amax"), strict=True)]
        ranks.append(torch.stack([end[0], there[0][last], best[0]]))
        probabilities.append(torch.stack([end[1], there[1][last], best[1]]))
    return (
        tokens,
        rank_of(final, gold) == 1,
        torch.stack(ranks, 1),
        torch.stack(probabilities, 1),
        final.gather(-1, tokens) - final.mean(-1, keepdim=True),
        logp.max(-1).values.exp(),
        -(logp.exp() * logp).sum(-1),
    )


def _standing(
    logits: Float[Tensor, "n V"], tokens: Int[Tensor, "n 2"]
) -> tuple[Int[Tensor, "n 2"], Float[Tensor, "n 2"]]:
    """Ranks and probabilities of two tokens."""
    ranks = torch.stack([rank_of(logits, one) for one in tokens.unbind(-1)], -1)
    return ranks, logits.float().softmax(-1).gather(-1, tokens)


def _best(values: Tensor, rows: Int[Tensor, " n"], n_prompts: int, how: str) -> Tensor:
    """The smallest or largest value among each prompt's rows."""
    into = values.new_zeros(n_prompts, 2)
    return into.scatter_reduce(0, rows[:, None].expand(-1, 2), values, how, include_self=False)
