"""What a cut edge delivers instead of its sender's current output.

A kind of ablation is a frozen dataclass whose fields are its settings:

- `zero`: nothing (the choice of Knowledge Circuits, arXiv 2405.17969);
- `mean`: the sender's mean output over the task's reference prompts, at the same position counted from END; a prompt's
  position 0 is a class of its own (`PositionClasses`);
- `resample`: its output on the paired corrupted prompt (another subject, as many tokens, another answer).

Everything that takes `ablation=` takes a kind's name, a kind with settings, or its text, `name(setting=value, ...)`.
The text is what circuits and sweeps record, so that a circuit is evaluated under what it was found with. A further
kind is a file with a subclass of `AblationKind` and one line, `@register_ablation`.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import DataError, SettingError, choose, shown, warn
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.models.network import Network
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task
from kcwb.tasks.variants import with_other_partners
from kcwb.verbs import noun, verb

#: A class of positions has at least this many prompts, where any has.
_LEAST = 3


@noun
@dataclass(frozen=True)
class AblationKind:
    """What a kind of ablation has to say; its fields are its settings, checked by their annotations.

    Attributes
    ----------
    name
        What it is known by.
    paired
        Whether it is defined only on prompts with a corrupted partner (`Prompts.paired`).
    """

    name: ClassVar[str]
    paired: ClassVar[bool] = False

    def fit(self, network: Network, task: Task | None) -> Any:
        """What it takes from a task once, given to `values` each time; SettingError if it needs a task and has none."""
        return None

    def values(self, network: Network, prompts: Prompts, fitted: Any) -> Float[Tensor, "S N T D"] | None:
        """Every sender's ablated output on each prompt; None where it is zero throughout.

        A prompt's values must not depend on the prompts beside it: runs take prompts in parts, and in any order.
        """
        raise NotImplementedError

    def told(self, prompts: Prompts, fitted: Any) -> str:
        """What a cut edge delivers on a prompt of somebody's own (`kcwb.tasks.own`), in a sentence."""
        return f"A cut edge delivers what {self} ablation gives on this prompt."

    def drawn_again(self, task: Task, seed: int) -> tuple[AblationKind, Task] | None:
        """The kind and the task with what is left to chance in them drawn anew; None if nothing is.

        A kind that has a `seed` among its settings gets another one.
        """
        if any(one.name == "seed" for one in fields(self)):
            return replace(self, **{"seed": seed}), task
        return None

    def __str__(self) -> str:
        """Its text, which `ablation_kind` reads: the name, and all settings where there are any."""
        settings = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(self))
        return f"{self.name}({settings})" if settings else self.name


#: Name -> kind, of all that are registered.
ABLATIONS: dict[str, type[AblationKind]] = {}
K = TypeVar("K", bound=type[AblationKind])


def register_ablation(kind: K) -> K:
    """Make a kind of ablation known by its name, and have it check its settings. To be used as a decorator."""
    before = ABLATIONS.get(kind.name)
    if before and (before.__module__, before.__qualname__) != (kind.__module__, kind.__qualname__):
        raise SettingError(f"There is an ablation {kind.name!r} already ({before.__module__}). Choose another name.")
    ABLATIONS[kind.name] = kind if before is kind else noun(kind)
    return kind


def ablation_kind(given: str | AblationKind) -> AblationKind:
    """A kind from its name or its text, `name(setting=value, ...)`; a kind as it is.

    SettingError if the name is not known, or a setting is not one of the kind's, or not what it must be.
    """
    if isinstance(given, AblationKind):
        return given
    name, bracket, rest = given.partition("(")
    kind = ABLATIONS[choose("The ablation", name.strip(), ABLATIONS)]
    try:
        call: Any = ast.parse(f"f({rest if bracket else ')'}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError
        values = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SettingError(f"The ablation {shown(given)} is not understood; write {kind()}.") from None
    known = [one.name for one in fields(kind)]
    for setting in values:
        if setting not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no settings"
            raise SettingError(f"The ablation {name} {takes}; {shown(setting)} is not one of them.")
    return kind(**values)


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
        The kind, with its settings.
    network
        The model's functions of nodes.
    fitted
        What the kind took from the task, or None.
    reference
        SHA-256 of the prompts that it took that from; empty if it took nothing.
    model_digest
        The weights that it is of.
    """

    kind: AblationKind
    network: Network
    model_digest: str
    fitted: Any = None
    reference: str = ""

    def usable(self, prompts: Prompts) -> Prompts:
        """The prompts that this ablation is defined on: of a paired kind, those with a partner; warns of the others.

        Raises
        ------
        DataError
            If none is left.
        """
        if not self.kind.paired or bool(prompts.paired.all()):
            return prompts
        words = self._lonely(prompts)
        rows = prompts.paired.nonzero()[:, 0].tolist()
        if not rows:
            raise DataError(f"{words}. Use zero or mean ablation, or a relation with more facts.")
        warn(f"{words}: left out.")
        return prompts.select(rows)

    @verb
    def splits(self, task: Task) -> dict[str, Prompts]:
        """The `usable` prompts of `D_val` and, if there are any, of `D_test`; warns where D_test has none.

        Raises
        ------
        DataError
            If D_val has none.
        """
        found = {"D_val": self.usable(task.val)}
        if len(task.test) and self.kind.paired and not bool(task.test.paired.any()):
            warn(f"{self._lonely(task.test)}: D_test is left out.")
        elif len(task.test):
            found["D_test"] = self.usable(task.test)
        return found

    def _lonely(self, prompts: Prompts) -> str:
        """Words that say which subjects have no partner."""
        without = [prompts.facts[i].subject for i in (~prompts.paired).nonzero()[:, 0].tolist()]
        return (
            f"{self.kind} ablation needs another fact whose prompt has as many tokens and whose answer starts "
            f"otherwise; there is none for {', '.join(f'{subject!r:.60}' for subject in without)}"
        )

    @torch.no_grad()
    def values(self, prompts: Prompts) -> Float[Tensor, "S N T D"] | None:
        """Every sender's ablated output on each prompt; None where it is zero throughout.

        Raises
        ------
        DataError
            Of a paired kind, if a prompt has no partner (`usable` leaves those out).
        """
        if self.kind.paired and not bool(prompts.paired.all()):
            raise DataError(f"{self._lonely(prompts)}. Leave those out: ablation.usable(prompts).")
        return self.kind.values(self.network, prompts, self.fitted)

    def told(self, prompts: Prompts) -> str:
        """What a cut edge delivers on a prompt of somebody's own, in a sentence."""
        return self.kind.told(prompts, self.fitted)


@verb
def make_ablation(model: Model, task: Task | None, kind: str | AblationKind) -> Ablation:
    """An ablation for the prompts of a task.

    Parameters
    ----------
    model, task
        The task's `reference` is what `mean` averages over; None for a kind that takes nothing from a task.
    kind
        A name of `ABLATIONS` (`zero`, `mean`, `resample`, or one of your own), a kind with settings, or its text.
    """
    kind = ablation_kind(kind)
    fitted = kind.fit(model.network, task)
    if task is None or fitted is None:
        return Ablation(kind, model.network, model.digest)
    prompts = task.reference
    digest = hashlib.sha256(prompts.tokens.cpu().numpy().tobytes() + prompts.lengths.cpu().numpy().tobytes())
    return Ablation(kind, model.network, model.digest, fitted, digest.hexdigest())


def check_made_for(model: Model, cuts: Ablation) -> None:
    """Refuse an ablation of another model, or of other weights, whose values are not this one's; SettingError."""
    if model.digest != cuts.model_digest and not isinstance(cuts.kind, Zero):
        raise SettingError(
            f"The {cuts.kind} ablation was made for weights {cuts.model_digest[:12]}; {model.name!r} has "
            f"{model.digest[:12]}. Make it again: make_ablation(model, task, {str(cuts.kind)!r})."
        )


# --- the kinds that come with the package ---


@register_ablation
class Zero(AblationKind):
    """Nothing."""

    name = "zero"

    def values(self, network: Network, prompts: Prompts, fitted: Any) -> None:
        """None: zero throughout."""
        return None

    def told(self, prompts: Prompts, fitted: Any) -> str:
        """Nothing."""
        return "A cut edge delivers nothing."


@register_ablation
class Mean(AblationKind):
    """The sender's mean output over the task's reference prompts, in the same class of positions."""

    name = "mean"

    def fit(self, network: Network, task: Task | None) -> tuple[Float[Tensor, "S K D"], PositionClasses]:
        """Each sender's mean output in each class of positions, and the classes."""
        if task is None:
            raise SettingError(
                "mean ablation averages over a task's prompts: pass the task, or its "
                "make_ablation(model, task, 'mean')."
            )
        return _mean_outputs(network, task.reference)

    def drawn_again(self, task: Task, seed: int) -> tuple[AblationKind, Task]:
        """A bootstrap resample of the reference prompts."""
        rows = np.random.default_rng(seed).integers(len(task.reference), size=len(task.reference))
        return self, replace(task, reference=task.reference.select(sorted(rows.tolist())))

    def values(self, network: Network, prompts: Prompts, fitted: Any) -> Float[Tensor, "S N T D"]:
        """The mean of each position's class."""
        means, classes = fitted
        return means[:, classes.of(prompts.ends, prompts.tokens.shape[1])]

    def told(self, prompts: Prompts, fitted: Any) -> str:
        """The task's mean; of places that its prompts do not have, which of theirs."""
        words = "A cut edge delivers its sender's mean over the task's prompts, at the same place counted from the end"
        offsets, far = fitted[1].offsets, 1 - int(prompts.ends[0])
        if len(offsets) and far < int(offsets.min()):
            back = -int(offsets.min())
            words += f"; farther back than {back} tokens, where too few of them reach, the mean {back} tokens back"
        return f"{words}."


@register_ablation
class Resample(AblationKind):
    """The sender's output on the corrupted prompt."""

    name, paired = "resample", True

    def drawn_again(self, task: Task, seed: int) -> tuple[AblationKind, Task]:
        """Other corrupted partners."""
        return self, with_other_partners(task, seed)

    def values(self, network: Network, prompts: Prompts, fitted: Any) -> Float[Tensor, "S N T D"]:
        """A run of the corrupted prompts."""
        return sender_outputs(network, prompts.corrupted)

    def told(self, prompts: Prompts, fitted: Any) -> str:
        """The corrupted prompt."""
        return f"A cut edge delivers what its sender writes on \u201c{prompts.facts[0].corrupted}\u201d."


def sender_outputs(network: Network, tokens: Int[Tensor, "N T"]) -> Float[Tensor, "S N T D"]:
    """Every sender's output on some prompts."""
    return forward(network, tokens, senders=True).senders


@torch.no_grad()
def _mean_outputs(network: Network, prompts: Prompts) -> tuple[Float[Tensor, "S K D"], PositionClasses]:
    """Each sender's mean output in each class of positions, and the classes."""
    steps = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    real = steps < (prompts.lengths + prompts.answer_mask.sum(1) - 1)[:, None]
    classes = PositionClasses.over(prompts.ends, real)
    weights = classes.weights(prompts.ends, real)
    means = torch.zeros(network.graph.n_senders, weights.shape[-1], network.d_model, device=network.device)

    def work(rows: slice) -> Tensor:
        return weights[rows].flatten(0, 1).T @ sender_outputs(network, prompts.tokens[rows]).flatten(1, 2).float()

    for part in by_prompts(network, prompts.tokens, work, what="mean"):
        means += part
    return means.to(network.dtype), classes
