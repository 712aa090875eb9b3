"""What a cut edge delivers instead of its sender's current output.

- `zero`: nothing (the choice of Knowledge Circuits, arXiv 2405.17969);
- `mean`: the sender's mean output over the task's reference prompts, at the same position counted from END; a prompt's
  position 0 is a class of its own (`PositionClasses`);
- `resample`: its output on the paired corrupted prompt (another subject, as many tokens, another answer).
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import DataError, choose
from kcwb.models.forward import forward, prompt_chunks
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.tasks.prompts import Prompts, Task
from kcwb.verbs import verb

ABLATIONS = ("zero", "mean", "resample")
#: A class of positions has at least this many prompts, where any has.
_LEAST = 3


@dataclass(frozen=True, eq=False)
class PositionClasses:
    """Which positions of prompts of any length share a mean.

    Position 0 is class 0: most models make it an attention sink, whose outputs are some thirty times as long as those
    of others, and a mean with a part of it would deliver sinks in the middle of a prompt. The others go by their offset
    from an anchor (END, or an encoder's mask); an offset that fewer than three prompts have takes the nearest that
    three have (if none has, the nearest of those that most prompts have).

    Attributes
    ----------
    offsets
        `[K - 1]`: the offsets from the anchor of classes 1, 2, ...
    """

    offsets: Int[Tensor, " K-1"]

    @classmethod
    def over(cls, anchors: Int[Tensor, " N"], real: Bool[Tensor, "N T"]) -> PositionClasses:
        """The classes that prompts can fill, from where their anchors are and which positions are not padding."""
        offsets, counts = _offsets(anchors, real.shape[1])[:, 1:][real[:, 1:]].unique(return_counts=True)
        return cls(offsets[counts >= counts.clamp(max=_LEAST).max()] if len(offsets) else offsets)

    def of(self, anchors: Int[Tensor, " N"], width: int) -> Int[Tensor, "N T"]:
        """The class of every position of some prompts."""
        offsets = _offsets(anchors, width)
        if not len(self.offsets):
            return torch.zeros_like(offsets)
        classes = 1 + (offsets[..., None] - self.offsets).abs().argmin(-1)
        classes[:, 0] = 0
        return classes

    def weights(self, anchors: Int[Tensor, " N"], real: Bool[Tensor, "N T"]) -> Float[Tensor, "N T K"]:
        """What each position of the prompts that the classes are over adds to each class's mean."""
        own = _offsets(anchors, real.shape[1])[..., None] == self.offsets
        members = torch.nn.functional.pad(own & real[..., None], (1, 0))
        members[:, 0] = False
        members[:, 0, 0] = True
        return members / members.sum((0, 1))


def _offsets(anchors: Int[Tensor, " N"], width: int) -> Int[Tensor, "N T"]:
    """Each position counted from its prompt's anchor: 0 there, negative before."""
    return torch.arange(width, device=anchors.device)[None] - anchors[:, None]


@dataclass(frozen=True, eq=False)
class Ablation:
    """What cut edges deliver, for any prompts of a task; made by `make_ablation`.

    Attributes
    ----------
    kind
        One of `ABLATIONS`.
    network
        The model's functions of nodes.
    means, classes
        For `mean`: `[S, K, D]`, each sender's mean output in each class of positions, and the classes.
    reference
        For `mean`: SHA-256 of the prompts that it averages over.
    """

    kind: str
    network: Network
    means: Float[Tensor, "S K D"] | None = None
    classes: PositionClasses | None = None
    reference: str = ""

    def usable(self, prompts: Prompts) -> Prompts:
        """The prompts that this ablation is defined on: under `resample`, those with a partner; warns of the others.

        Raises
        ------
        DataError
            If none is left.
        """
        if self.kind != "resample" or bool(prompts.paired.all()):
            return prompts
        words = self._lonely(prompts)
        rows = prompts.paired.nonzero()[:, 0].tolist()
        if not rows:
            raise DataError(f"{words}. Use zero or mean ablation, or a relation with more facts.")
        warnings.warn(f"{words}: left out.", stacklevel=2)
        return prompts.select(rows)

    def _lonely(self, prompts: Prompts) -> str:
        """Words that say which subjects have no partner."""
        without = [prompts.facts[i].subject for i in (~prompts.paired).nonzero()[:, 0].tolist()]
        return (
            "resample ablation needs another fact whose prompt has as many tokens and whose answer starts otherwise; "
            f"there is none for {', '.join(f'{subject!r:.60}' for subject in without)}"
        )

    @torch.no_grad()
    def values(self, prompts: Prompts) -> Float[Tensor, "S N T D"] | None:
        """Every sender's ablated output on each prompt; None where it is zero throughout.

        Raises
        ------
        DataError
            Under `resample`, if a prompt has no partner (`usable` leaves those out).
        """
        if self.kind == "zero":
            return None
        if self.kind == "resample":
            if not bool(prompts.paired.all()):
                raise DataError(f"{self._lonely(prompts)}. Leave those out: ablation.usable(prompts).")
            senders = forward(self.network, prompts.corrupted, senders=True).senders
            assert senders is not None  # asked for in the line above
            return senders
        assert self.means is not None and self.classes is not None  # make_ablation sees to it
        return self.means[:, self.classes.of(prompts.ends, prompts.tokens.shape[1])]


@verb
def make_ablation(model: Model, task: Task, kind: str) -> Ablation:
    """An ablation for the prompts of a task.

    Parameters
    ----------
    model, task
        The task's `reference` is what `mean` averages over.
    kind
        `zero`, `mean` or `resample`.
    """
    choose("The ablation", kind, ABLATIONS)
    if kind != "mean":
        return Ablation(kind, model.network)
    prompts = task.reference
    digest = hashlib.sha256(prompts.tokens.cpu().numpy().tobytes() + prompts.lengths.cpu().numpy().tobytes())
    return Ablation(kind, model.network, *_mean_outputs(model.network, prompts), digest.hexdigest())


@torch.no_grad()
def _mean_outputs(network: Network, prompts: Prompts) -> tuple[Float[Tensor, "S K D"], PositionClasses]:
    """Each sender's mean output in each class of positions, and the classes."""
    steps = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    real = steps < (prompts.lengths + prompts.answer_mask.sum(1) - 1)[:, None]
    classes = PositionClasses.over(prompts.ends, real)
    weights = classes.weights(prompts.ends, real)
    means = torch.zeros(network.graph.n_senders, weights.shape[-1], network.d_model, device=network.device)
    for rows in prompt_chunks(network, prompts.tokens):
        senders = forward(network, prompts.tokens[rows], senders=True).senders
        assert senders is not None  # asked for in the line above
        means += weights[rows].flatten(0, 1).T @ senders.flatten(1, 2).float()
    return means.to(network.dtype), classes
