"""A change of a model's weights that can be put in and taken out, whatever happens meanwhile.

Taking it out copies the saved weights back: they are bit for bit what they were. Nothing stops that half-way, neither
Ctrl-C (`kcwb.editing.interrupts`) nor an exception: it is done to its end, and then they come.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.interrupts import guard, settle, whole
from kcwb.errors import KcwbError, SettingError
from kcwb.locks import Exclusive, WeightsLock
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.tasks.relations import Fact
from kcwb.verbs import noun


class EditError(KcwbError):
    """An edit did not converge, or cannot be put in or taken out; the model is as it was."""


@noun
@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a model's weights that makes it say something else; made by `edit`.

    Attributes
    ----------
    model
        The model that it was made for.
    facts, targets, templates
        What it changes: the facts, their new objects, and the prompts' templates.
    method, layers
        The editor, and the layers whose MLP's down-projection it changes.
    parameters
        Everything that determined it, ready for JSON. `defaults` says which values were taken without being given,
        since they are known to work on this model, and their `source` (`kcwb.editing.known`); where nothing is known,
        the layer is a share of the depth. What is in neither is the method's own default, the same for all models.
    deltas
        Layer -> `[M, D]`: the change of the down-projection (input dimension first), in float32 at least. Weights of
        less precision get their sum with it, rounded once.
    losses
        One row per step: `step`, `loss`, `nll` and what else the method watches; MEMIT has a `request`, too.
    keys, values
        k* `[n, M]` and v* `[n, D]` of each request (MEMIT: the last layer's keys, and the wanted streams); None for
        fine-tuning.
    nll
        The target's loss on its own prompt, without prefixes, by the edited weights: nats per token, all of the
        target's tokens being read at their own positions; the worst of several requests. This is what `bound` judges.
    nll_prefixed
        The same over the prompts with prefixes, their mean; None where the method has no prefixes.
    objective
        The loss with which optimisation ended (the worst of several requests): by the method's own formula, over its
        own prompts, and for ROME and MEMIT with δ added to the stream instead of by edited weights. The last of
        `losses`.
    seconds
        How long it took.
    kept
        Layer -> `[n, M]`: the keys whose outputs it changes; AlphaEdit's edits on top of it leave these outputs alone.
    rounding
        The share of the change, by its Frobenius norm, that is lost as weights are rounded to the model's precision.
    details
        What else the method reports, for example ROME's prefixes and `direction_agreement`: the cosine between the
        directions C⁻¹k* of two disjoint halves of the text.
    """

    model: Model
    facts: tuple[Fact, ...]
    targets: tuple[str, ...]
    templates: tuple[str, ...]
    method: str
    layers: tuple[int, ...]
    parameters: Mapping[str, Any]
    deltas: Mapping[int, Float[Tensor, "M D"]]
    losses: pd.DataFrame
    keys: Float[Tensor, "n M"] | None
    values: Float[Tensor, "n D"] | None
    objective: float
    seconds: float
    nll: float = math.nan
    nll_prefixed: float | None = None
    kept: Mapping[int, Float[Tensor, "n M"]] = field(default_factory=dict)
    rounding: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    _hold: Exclusive = field(default_factory=Exclusive, init=False, repr=False)

    @property
    def active(self) -> bool:
        """Whether it is in the weights now."""
        return self in [saved.edit for saved in _stack(self.model.network)]

    @property
    def digest(self) -> str:
        """SHA-256 of the changes of the weights."""
        digest = hashlib.sha256()
        for layer, delta in sorted(self.deltas.items()):
            digest.update(f"{layer} {tuple(delta.shape)} {delta.dtype}\n".encode())
            digest.update(delta.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def require_own(self, model: Model) -> None:
        """Raise SettingError unless it was made for this model's weights, since it is these tensors that it changes.

        Equal weights in other tensors stay as they are: what is then measured there would be the unedited model.
        """
        if model is not self.model and model not in self.model.siblings:
            raise SettingError(
                f"{self} was made for another Model object than this {model.name}, loaded beside it: its weights are "
                "those that change. Give the edit's own model (`made.model`), or make the edit again for this one."
            )

    def _record(self, onto: str) -> dict[str, Any]:
        """What a model whose weights it is in says about it; `onto` is the digest of the weights before."""
        return {
            "facts": [[fact.subject, fact.object] for fact in self.facts],
            "targets": list(self.targets),
            "templates": list(self.templates),
            "layers": list(self.layers),
            "parameters": dict(self.parameters),
            "rounding": self.rounding,
            "digest": self.digest,
            "onto": onto,
        }

    @property
    def lock(self) -> WeightsLock:
        """The model's: the edit goes in and out while no other thread runs the model."""
        return self.model.lock

    def apply(self) -> Model:
        """Put it into the weights, on top of edits that are in already; `undo` takes it out. All or nothing.

        Waits until no other thread runs the model. Between `apply` and `undo` others may; within `with` they wait.

        Raises
        ------
        EditError
            If it is in already.
        """
        with self.model.exclusive():
            return self._put_in(Exclusive())

    def _put_in(self, hold: Exclusive) -> Model:
        """What `apply` does; `hold` is what `with` keeps other threads away by."""
        if self.active:
            raise EditError(f"{self} is in the weights already; undo it first.")
        model, network = self.model, self.model.network
        weights = {layer: network.layers[layer].W_out for layer in self.layers}
        saved = _Saved(
            self, {layer: weight.clone() for layer, weight in weights.items()}, model.name, model.digest, model.edits
        )
        joint = hashlib.sha256(f"{model.digest} {self.digest}".encode()).hexdigest()
        edits = (*model.edits, self._record(model.digest))
        try:
            guard()
            object.__setattr__(self, "_hold", hold)
            _stack(network).append(saved)
            for layer, weight in weights.items():
                weight.copy_(changed(weight, self.deltas[layer]))
            _identify(model, f"{model.name} + {self.method}", joint, edits)
            return model
        except BaseException:
            self.undo()
            raise

    @whole(lambda self: self.active and not self.lock.elsewhere)
    def undo(self) -> None:
        """Take it out: weights are bit for bit what they were; does nothing if it is not in.

        Waits until no other thread runs the model; what interrupts it from then on comes after it.

        Raises
        ------
        EditError
            If another edit was put in after it.
        """
        try: self._take_out()  # fmt: skip  # noqa: E701  (one line: no step comes before the `try`)
        except EditError:
            raise
        except BaseException:
            if not self.lock.elsewhere:  # else it was still waiting
                self._take_out()  # once more, from its start
            raise
        finally:
            settle(last=not any(_ACTIVE.values()) and not self._hold.holds)

    def _take_out(self) -> None:
        """What `undo` does; may be stopped anywhere, and begun again."""
        with self.model.exclusive():
            stack = _stack(self.model.network)
            if not self.active:
                return
            if stack[-1].edit is not self:
                raise EditError(f"{stack[-1].edit} was put in after {self}; undo that first.")
            saved = stack[-1]
            for layer, weight in saved.weights.items():
                self.model.network.layers[layer].W_out.copy_(weight)
            _identify(self.model, saved.name, saved.digest, saved.edits)
            stack.pop()

    def __enter__(self) -> Model:
        """Put it in; other threads wait for the model until it is out again."""
        hold = self.model.exclusive()
        try:
            hold.__enter__()
            return self._put_in(hold)
        except BaseException:
            hold.__exit__()
            raise

    @whole(lambda self: self.active or self._hold.holds)
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try: self.undo()  # fmt: skip  # noqa: E701
        except EditError as refused:
            if error is None:
                raise
            error.add_note(f"Beside that: {refused}")
        except BaseException:
            self.undo()  # where that was stopped before its first step
            raise
        finally:
            self._hold.__exit__()
            settle(last=not any(_ACTIVE.values()))

    def __repr__(self) -> str:
        """One line: what, how and where."""
        first = f"{self.facts[0].subject!r:.40}: {self.facts[0].object!r:.40} -> {self.targets[0]!r:.40}"
        more = f" and {len(self.facts) - 1} more" if len(self.facts) > 1 else ""
        layers, taken = ", ".join(map(str, self.layers)), self.parameters["defaults"]
        source = f" ({taken['source']})" if "layer" in taken else ""
        return f"Edit({first}{more}; {self.method}, layer {layers}{source}, target's loss {self.nll:.2f})"


@dataclass(frozen=True, eq=False)
class _Saved:
    """What an edit that is in has replaced."""

    edit: Edit
    weights: Mapping[int, Tensor]
    name: str
    digest: str
    edits: tuple[Mapping[str, Any], ...]


def changed(weight: Float[Tensor, "M D"], delta: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
    """The weights with a change, added in float32 at least and rounded once to their own precision."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def lost_by_rounding(network: Network, deltas: Mapping[int, Float[Tensor, "M D"]]) -> float:
    """`Edit.rounding` of a change of the weights as they are now; 0 for no change."""
    lost, whole = 0.0, 0.0
    for layer, delta in deltas.items():
        weight = network.layers[layer].W_out
        wide = changed(weight, delta).double() - weight.double()
        lost += float((wide - delta.double()).square().sum())
        whole += float(delta.double().square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def kept_keys(network: Network, layer: int) -> list[Float[Tensor, "n M"]]:
    """The keys in one layer of the edits that are in a network's weights, the earliest edit's first."""
    return [saved.edit.kept[layer] for saved in _stack(network) if layer in saved.edit.kept]


#: Where weights are in memory -> the edits that are in them. These keep their model, so that no other comes there.
_ACTIVE: dict[int, list[_Saved]] = {}


def _stack(network: Network) -> list[_Saved]:
    """The edits that are in a network's weights, the latest last; one list for all networks of these weights."""
    return _ACTIVE.setdefault(network.W_E.data_ptr(), [])


def _identify(model: Model, name: str, digest: str, edits: tuple[Mapping[str, Any], ...]) -> None:
    """Let all models over the same tensors say whose weights they have.

    They are frozen for everybody else: this follows a change of the weights.
    """
    for one in (model, *model.siblings):
        object.__setattr__(one, "name", name)
        object.__setattr__(one, "digest", digest)
        object.__setattr__(one, "edits", edits)
