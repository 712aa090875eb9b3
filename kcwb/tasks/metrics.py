"""How well a run answers: losses in nats (less is better), and Hit@k (of the rank that `kcwb.tasks.ranks` defines).

All take logits at the answer positions, `[..., N, A, V]`, with any number of leading candidate axes. A loss is the
mean over the answer's tokens, then over prompts:

- `nll`: minus the log-probability of the answer's tokens;
- `kl`: KL(full model || run) of the next-token distributions;
- `logit_diff`: minus (answer's logit - foil's logit), of the answer's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import DataError, KcwbError, choose
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.settings import Count
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.ranks import rank_of, rank_product
from kcwb.verbs import verb

METRICS = ("nll", "kl", "logit_diff")


@dataclass(frozen=True, eq=False)
class Loss:
    """A metric on some prompts, ready to score logits; made by `make_loss`.

    Attributes
    ----------
    metric
        One of `METRICS`.
    prompts
        What is asked.
    full
        For `kl`, the full model's log-probabilities `[N, A, V]`.
    counts
        How often each prompt counts in the mean; None: once.
    """

    metric: str
    prompts: Prompts
    full: Float[Tensor, "N A V"] | None = None
    counts: tuple[int, ...] | None = None

    def __call__(self, logits: Float[Tensor, "... N A V"]) -> Float[Tensor, "..."]:
        """The loss of each candidate; KcwbError if logits are not numbers."""
        each = self.per_prompt(logits)
        loss = each.mean(-1) if self.counts is None else each @ each.new_tensor(self.counts) / self.total
        if not torch.isfinite(loss).all():
            raise KcwbError(f"The {self.metric} of a run is not a number: its logits overflow. Use float32.")
        return loss

    def per_prompt(self, logits: Float[Tensor, "... N A V"]) -> Float[Tensor, "... N"]:
        """The loss of each prompt."""
        logits = logits.float()
        if self.metric == "logit_diff":
            pair = torch.stack([self.prompts.answers[:, 0], self.prompts.foils], -1)
            own, foil = _pick(logits[..., 0, :], pair).unbind(-1)
            return foil - own
        if self.metric == "nll":
            answers = self.prompts.answers[..., None]
            per_token = logits.logsumexp(-1) - _pick(logits, answers)[..., 0]
        else:
            assert self.full is not None  # make_loss sees to it
            per_token = (self.full.exp() * (self.full - logits.log_softmax(-1))).sum(-1)
        mask = self.prompts.answer_mask
        return (per_token * mask).sum(-1) / mask.sum(-1)

    @property
    def total(self) -> int:
        """How many prompts the mean is over, each as often as it counts."""
        return len(self.prompts) if self.counts is None else sum(self.counts)

    def select(self, rows: Sequence[int]) -> Loss:
        """The same metric on some of the prompts."""
        part = self.prompts.select(rows)
        full = None if self.full is None else self.full[list(rows), : part.answers.shape[1]]
        return Loss(self.metric, part, full, self.counts and tuple(self.counts[i] for i in rows))

    def resampled(self, counts: Sequence[int]) -> Loss:
        """The same metric on a resample, in which each prompt stands so often: every one of them is run once."""
        rows = [row for row, count in enumerate(counts) if count]
        return replace(self.select(rows), counts=tuple(counts[row] for row in rows))


@verb
def make_loss(model: Model, prompts: Prompts, metric: str = "nll") -> Loss:
    """A metric on prompts.

    Raises
    ------
    SettingError
        If the metric is not known.
    DataError
        If `logit_diff` has no foil for a prompt.
    """
    choose("The metric", metric, METRICS)
    if metric == "logit_diff" and bool((prompts.foils < 0).any()):
        fact = prompts.facts[int((prompts.foils < 0).nonzero()[0])]
        raise DataError(
            f"logit_diff needs a foil for {fact.subject!r:.60}: the relation has no object that starts otherwise than "
            f"{fact.object!r:.60}. Name one: make_task(..., foil=...)."
        )
    if metric != "kl":
        return Loss(metric, prompts)
    with torch.no_grad():
        residual = forward(model.network, prompts.tokens).residual
        return Loss(metric, prompts, model.network.logits(at_answers(residual, prompts)).float().log_softmax(-1))


def kc_scale(prompts: Prompts) -> float:
    """What the Knowledge Circuits code's MatchNLL is multiplied by to give our nll on the same prompts.

    Its sum over the answers' tokens is divided by all T - 1 positions of the padded batch (a prompt and its answer have
    up to T tokens), ours by each answer's own tokens: (T - 1) / tokens, or their mean where answers differ in length.
    """
    tokens = prompts.answer_mask.sum(1)
    return float((prompts.lengths + tokens - 1).max() / tokens.float().mean())


def at_answers(residual: Float[Tensor, "... N T D"], prompts: Prompts) -> Float[Tensor, "... N A D"]:
    """The residual stream at the positions that predict the answer's tokens."""
    rows = torch.arange(len(prompts), device=residual.device)[:, None]
    return residual[..., rows, prompts.positions, :]


@verb
def hit_at_k(logits: Float[Tensor, "... N A V"], prompts: Prompts, k: Count = 10) -> Bool[Tensor, "... N"]:
    """Whether the answer's rank is at most k; ties count against it."""
    return answer_ranks(logits, prompts) <= k


@verb
def answer_ranks(logits: Float[Tensor, "... N A V"], prompts: Prompts) -> Int[Tensor, "... N"]:
    """The rank of each answer, from 1: the product of those of its tokens up to the one that decides."""
    width = max(1, int(prompts.decides.max()) + 1) if len(prompts) else 1
    tokens = [logits[..., i, :] for i in range(width)]
    answers = [prompts.answers[:, i].expand(of_token.shape[:-1]) for i, of_token in enumerate(tokens)]
    return rank_product(torch.stack([*map(rank_of, tokens, answers)], -1), prompts.decides)


def _pick(values: Float[Tensor, "... V"], index: Int[Tensor, "... i"]) -> Float[Tensor, "... i"]:
    """Gather along the last axis, broadcasting the index over candidate axes."""
    return values.gather(-1, index.expand(*values.shape[:-1], index.shape[-1]))
