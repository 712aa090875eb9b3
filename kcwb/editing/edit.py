"""One verb for all editors, and the edit that it returns: a change of weights that can be put in and taken out.

    with kcwb.edit(model, Fact("France", "Paris"), "Rome", template="The capital of {} is") as edited:
        ...  # `edited` is `model`, its weights changed
    # here the weights are bit for bit what they were

Finding an edit changes nothing. While an edit is in, `model.digest` and `model.name` say so, since whatever is found
then (circuits, tasks, cached results) is not the unedited model's.
"""

from __future__ import annotations

import hashlib
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.fine_tuning import TuningSettings, fine_tune
from kcwb.editing.memit import MemitSettings, memit
from kcwb.editing.passes import make_rows
from kcwb.editing.rome import Fit, RomeSettings, rome
from kcwb.errors import KcwbError, SettingError, choose, nearest
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.progress import Progress
from kcwb.tasks.prompts import rank_of
from kcwb.tasks.relations import Fact, check_template
from kcwb.tasks.subjects import blank, places

#: Method -> its settings.
METHODS: dict[str, type] = {
    "rome": RomeSettings,
    "ft_m": TuningSettings,
    "ft_l": TuningSettings,
    "memit": MemitSettings,
}
#: The layers that a sweep of ROME found best; other models take a share of the depth. For SmolLM2-135M, over eight
#: facts (`layer_sweep` on `edit_cases(model, n=8, seed=1)`), ES is 1 at layers 1 to 9 and PS .88 (.81 at 9). The later
#: the layer, the more an edit spills: NS, P(true) - P(new) of the neighbours, and the share of the subject's other
#: answers that change, are at layer 1 1, .41, .58; 3 1, .39, .58; 5 .90, .35, .83; 7 .81, .13, .92; 9 .83, .16, .92.
BEST_LAYERS = {"smollm2-135m": {"rome": 3, "ft_m": 3, "ft_l": 3, "memit": 5}}
DEFAULT_DEPTH = 0.3


class EditError(KcwbError):
    """An edit did not converge, or cannot be put in or taken out; the model is as it was."""


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
        Everything that determined it, ready for JSON.
    deltas
        Layer -> `[M, D]`: the change of the down-projection (input dimension first).
    losses
        One row per step: `step`, `loss`, `nll` and what else the method watches; MEMIT has a `request`, too.
    keys, values
        k* `[n, M]` and v* `[n, D]` of each request (MEMIT: the last layer's keys, and the wanted streams); None for
        fine-tuning.
    nll
        The target's loss at the end, nats per token (the worst of several requests).
    seconds
        How long it took.
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
    nll: float
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether it is in the weights now."""
        return any(saved.edit is self for saved in _stack(self.model.network))

    @property
    def digest(self) -> str:
        """SHA-256 of the changes of the weights."""
        digest = hashlib.sha256()
        for layer, delta in sorted(self.deltas.items()):
            digest.update(f"{layer} {tuple(delta.shape)} {delta.dtype}\n".encode())
            digest.update(delta.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def apply(self) -> Model:
        """Put it into the weights, on top of edits that are in already; `undo` takes it out.

        Raises
        ------
        EditError
            If it is in already.
        """
        if self.active:
            raise EditError(f"{self} is in the weights already; undo it first.")
        model, network = self.model, self.model.network
        weights = {layer: network.layers[layer].W_out for layer in self.layers}
        saved = _Saved(self, {layer: weight.clone() for layer, weight in weights.items()}, model.name, model.digest)
        joint = hashlib.sha256(f"{model.digest} {self.digest}".encode()).hexdigest()
        _stack(network).append(saved)
        try:
            with torch.no_grad():
                for layer, weight in weights.items():
                    weight.add_(self.deltas[layer])
            _identify(model, f"{model.name} + {self.method}", joint)
        except BaseException:
            self.undo()
            raise
        return model

    def undo(self) -> None:
        """Take it out: weights are bit for bit what they were; does nothing if it is not in.

        Raises
        ------
        EditError
            If another edit was put in after it.
        """
        stack = _stack(self.model.network)
        if not self.active:
            return
        if stack[-1].edit is not self:
            raise EditError(f"{stack[-1].edit} was put in after {self}; undo that first.")
        saved = stack[-1]
        with torch.no_grad():
            for layer, weight in saved.weights.items():
                self.model.network.layers[layer].W_out.copy_(weight)
        _identify(self.model, saved.name, saved.digest)
        stack.pop()

    def __enter__(self) -> Model:
        return self.apply()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        """One line: what, how and where."""
        first = f"{self.facts[0].subject!r:.40}: {self.facts[0].object!r:.40} -> {self.targets[0]!r:.40}"
        more = f" and {len(self.facts) - 1} more" if len(self.facts) > 1 else ""
        layers = ", ".join(map(str, self.layers))
        return f"Edit({first}{more}; {self.method}, layer {layers}, target's loss {self.nll:.2f})"


@dataclass(frozen=True, eq=False)
class _Saved:
    """What an edit that is in has replaced."""

    edit: Edit
    weights: Mapping[int, Tensor]
    name: str
    digest: str


_ACTIVE: weakref.WeakKeyDictionary[Network, list[_Saved]] = weakref.WeakKeyDictionary()


def _stack(network: Network) -> list[_Saved]:
    """The edits that are in a network's weights, the latest last."""
    return _ACTIVE.setdefault(network, [])


def _identify(model: Model, name: str, digest: str) -> None:
    """Let a model say whose weights it has. It is frozen for everybody else: this follows a change of its weights."""
    object.__setattr__(model, "name", name)
    object.__setattr__(model, "digest", digest)


def edit(
    model: Model,
    fact: Fact | Sequence[Fact],
    target: str | Sequence[str],
    method: str = "rome",
    *,
    template: str | Sequence[str],
    layer: int | None = None,
    bound: float = 1.0,
    seed: int = 0,
    progress: Progress = True,
    **settings: Any,
) -> Edit:
    """Find a change of weights after which the model gives a fact's subject another object. Changes nothing yet.

    Parameters
    ----------
    model
        The model, edited already or not.
    fact, target
        The fact as it is, and the object that it is to have; MEMIT takes sequences of both.
    method
        `rome`, `memit`, `ft_m` or `ft_l`; see the modules of `kcwb.editing`.
    template
        How the fact is asked, with `{}` in it, or the subject itself once, as whole words; one for all facts, or one
        for each.
    layer
        The layer whose MLP is changed (MEMIT: the last of the range). None takes `default_layer(model, method)`.
    bound
        The target's loss, in nats per token, that the edit must get under on its own prompts (with prefixes); else it
        is refused. `math.inf` takes whatever comes, for statistics over sets of edits.
    seed
        Of prefixes, text and sampling.
    progress
        Reported per step.
    settings
        The method's own, see `RomeSettings`, `MemitSettings`, `TuningSettings`: for example `clamp`, `steps`.

    Returns
    -------
    Edit
        To be used as a context manager, or with `apply` and `undo`.

    Raises
    ------
    ModelError
        If its family is not covered (`kcwb models`), or the model lies on several devices.
    SettingError
        If the subject is not in the template (once, as whole words), the target is the current answer, the layer is
        out of range, or a setting cannot be meant.
    EditError
        If the loss is not a number or does not get under its bound.
    DataError
        If a prompt does not fit into the context, or an answer runs into its prompt.
    """
    facts = (fact,) if isinstance(fact, Fact) else tuple(fact)
    targets = (target,) if isinstance(target, str) else tuple(target)
    given = (template,) * len(facts) if isinstance(template, str) else tuple(template)
    chosen = _settings(method, settings)
    layer = default_layer(model, method) if layer is None else layer
    templates = _check(model, facts, targets, given, method, layer, bound)
    started = time.perf_counter()
    if isinstance(chosen, MemitSettings):
        fit = memit(model, facts, targets, templates, layer, chosen, seed, progress)
    elif isinstance(chosen, RomeSettings):
        fit = rome(model, facts[0], targets[0], templates[0], layer, chosen, seed, progress)
    else:
        at_end = method == "ft_l"
        fit = fine_tune(model, facts[0], targets[0], templates[0], layer, chosen, at_end=at_end, progress=progress)
    _check_fit(model, fit, method, targets, bound)
    parameters = {"method": method, "layer": layer, "seed": seed, "model": model.digest, **asdict(chosen)}
    return Edit(
        model=model,
        facts=facts,
        targets=targets,
        templates=templates,
        method=method,
        layers=tuple(sorted(fit.deltas)),
        parameters=parameters,
        deltas=fit.deltas,
        losses=pd.DataFrame(fit.losses),
        keys=fit.keys,
        values=fit.values,
        nll=fit.nll,
        seconds=time.perf_counter() - started,
        details=fit.details,
    )


def default_layer(model: Model, method: str = "rome") -> int:
    """The layer that is edited where none is given: the best one known, else about a third of the depth."""
    known = BEST_LAYERS.get(model.name.partition(" + ")[0], {})
    return known.get(method, round(DEFAULT_DEPTH * model.graph.n_layers))


def _settings(method: str, given: dict[str, Any]) -> Any:
    kind = METHODS[choose("The method", method, METHODS)]
    known = list(kind.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise SettingError(f"{method} has no setting {name!r}. {nearest(name, known)}")
    return kind(**given)


def _check(
    model: Model, facts: Sequence[Fact], targets: Sequence[str], templates: Sequence[str], method: str, layer: int,
    bound: float,
) -> tuple[str, ...]:  # fmt: skip
    """Refuse what cannot be meant; the templates, each with `{}`."""
    model.network.require("editing")
    n_layers = model.graph.n_layers
    if not 0 <= layer < n_layers:
        raise SettingError(f"layer={layer}: {model.name} has layers 0 to {n_layers - 1}.")
    if not bound > 0:
        raise SettingError(f"bound={bound}: the loss to get under must be above 0 nats.")
    if not facts or not len(facts) == len(targets) == len(templates):
        raise SettingError(
            f"{len(facts)} facts, {len(targets)} targets, {len(templates)} templates: give as many of each, at least 1."
        )
    if len(facts) > 1 and method != "memit":
        raise SettingError(f"{method} changes one fact at a time; memit takes {len(facts)}.")
    if len({fact.subject for fact in facts}) < len(facts):
        raise SettingError("A subject stands in more than one of the facts; edit those one after the other.")
    whole = tuple(_with_gap(fact, template) for fact, template in zip(facts, templates, strict=True))
    for fact, target, template in zip(facts, targets, whole, strict=True):
        if not target.strip() or target != target.strip():
            raise SettingError(f"The target {target!r:.60} is empty, or starts or ends with white space.")
        if target == fact.object or _is_answer(model, Fact(fact.subject, target), template):
            raise SettingError(
                f"The target {target!r:.60} is already the answer to {template.replace('{}', fact.subject)!r:.120}; "
                "choose another."
            )
    return whole


def _with_gap(fact: Fact, template: str) -> str:
    if "{}" not in template:
        found = len(places(template, fact.subject))
        if found != 1:
            raise SettingError(
                f"The subject {fact.subject!r:.60} stands {found} times as whole words in the template "
                f"{template!r:.120}; it must stand there once, or {{}} in its place."
            )
        template = str(blank(template, fact.subject))
    return check_template(template, "template")


@torch.no_grad()
def _is_answer(model: Model, fact: Fact, template: str) -> bool:
    """Whether each token of the object is already the model's first choice."""
    rows = make_rows(model, [(fact, template)])
    logits = model.logits(rows.tokens)[0, rows.positions[0]]
    return bool((rank_of(logits, rows.answers[0]) == 1).all())


def _check_fit(model: Model, fit: Fit, method: str, targets: Sequence[str], bound: float) -> None:
    """Raise EditError unless all numbers are numbers, and the loss is under its bound."""
    numbers = [fit.nll, *(record["loss"] for record in fit.losses)]
    finite = all(map(math.isfinite, numbers)) and all(bool(one.isfinite().all()) for one in fit.deltas.values())
    if not finite:
        raise EditError(
            f"The {method} edit diverged: its loss is {fit.nll}. Take a smaller lr. The model is as it was."
        )
    if fit.nll >= bound:
        raise EditError(
            f"The {method} edit did not converge: the loss of {targets[0]!r:.60} is {fit.nll:.2f} nats, and must get "
            f"under {bound:.2f}. Take more steps, a larger clamp or another layer. The model is as it was."
        )
