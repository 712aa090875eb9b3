"""How well a run answers: losses in nats (less is better), and Hit@k (of the rank that `kcwb.tasks.ranks` defines).

All take logits at the answer positions, `[..., N, A, V]`, with any number of leading candidate axes. A loss is the
mean over the answer's tokens, then over prompts:

- `nll`: minus the log-probability of the answer's tokens;
- `kl`: KL(full model || run) of the next-token distributions;
- `logit_diff`: minus (answer's logit - foil's logit), of the answer's first token.

Of several right answers, which have all tokens but the last in common, `nll` takes the sum of their probabilities, and
`logit_diff` the logarithm of the sum of the exponentials of their logits; so of several foils. Prompts with wrong
answers of their own are compared with those at the token that decides: `kcwb.tasks.prompts.Prompts.compared`.
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
from kcwb.tasks.ranks import rank_of_best, rank_product
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
            return self._compared(logits, self.prompts.all_foils[:, None]) - self._compared(logits, self.prompts.right)
        if self.metric == "nll":
            per_token = logits.logsumexp(-1) - together(logits, self.prompts.right)
        else:
            assert self.full is not None  # make_loss sees to it
            per_token = (self.full.exp() * (self.full - logits.log_softmax(-1))).sum(-1)
        mask = self.prompts.answer_mask
        return (per_token * mask).sum(-1) / mask.sum(-1)

    def _compared(self, logits: Float[Tensor, "... N A V"], tokens: Int[Tensor, "N #A K"]) -> Float[Tensor, "... N"]:
        """The logit of some tokens together, where right answers are compared with foils."""
        rows, places = torch.arange(len(tokens), device=tokens.device), self.prompts.compared
        if tokens.shape[1] > 1:
            tokens = tokens[rows, places][:, None]
        if not bool(places.any()):
            return together(logits[..., :1, :], tokens)[..., 0]
        return together(logits[..., rows, places, :][..., None, :], tokens)[..., 0]

    @property
    def total(self) -> int:
        """How many prompts the mean is over, each as often as it counts."""
        return len(self.prompts) if self.counts is None else sum(self.counts)

    def select(self, rows: Sequence[int] | slice) -> Loss:
        """The same metric on some of the prompts."""
        rows = range(len(self.prompts))[rows] if isinstance(rows, slice) else rows
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


def at_end(x: Float[Tensor, "*any N T D"], prompts: Prompts) -> Float[Tensor, "*any N D"]:
    """What is at each prompt's END."""
    return x[..., torch.arange(len(prompts), device=x.device), prompts.ends, :]


@verb
def hit_at_k(logits: Float[Tensor, "... N A V"], prompts: Prompts, k: Count = 10) -> Bool[Tensor, "... N"]:
    """Whether the answer's rank is at most k; ties count against it."""
    return answer_ranks(logits, prompts) <= k


@verb
def answer_ranks(logits: Float[Tensor, "... N A V"], prompts: Prompts) -> Int[Tensor, "... N"]:
    """The rank of each answer, from 1: the product of those of its tokens up to the one that decides."""
    width = max(1, int(prompts.decides.max()) + 1) if len(prompts) else 1
    right = prompts.right
    ranks = [
        rank_of_best(logits[..., i, :], right[:, i].expand(*logits.shape[:-2], right.shape[-1])) for i in range(width)
    ]
    return rank_product(torch.stack(ranks, -1), prompts.decides)


def answer_probabilities(logits: Float[Tensor, "... N A V"], prompts: Prompts) -> Float[Tensor, "... N"]:
    """The probability of each answer: the product of those of its tokens up to the one that decides.

    Where no token tells an answer apart it is 1, the product of none; its rank says so (`kcwb.tasks.ranks`).
    """
    steps = torch.arange(prompts.answers.shape[1], device=logits.device)
    logp = together(logits.float().log_softmax(-1), prompts.right)
    return (logp * (steps <= prompts.decides[:, None])).sum(-1).exp()


def together(values: Float[Tensor, "... V"], tokens: Int[Tensor, "... K"]) -> Float[Tensor, "..."]:
    """Logits or log-probabilities of some tokens, as of one: log of the sum of exponentials; -1 stands for none."""
    index = tokens.expand(*values.shape[:-1], tokens.shape[-1])
    if index.shape[-1] == 1:
        return values.gather(-1, index)[..., 0]
    return values.gather(-1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf).logsumexp(-1)
