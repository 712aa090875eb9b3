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
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.fine_tuning import TuningSettings, fine_tune
from kcwb.editing.known import known_settings
from kcwb.editing.memit import MemitSettings, memit
from kcwb.editing.passes import make_rows, measured_nll
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
        Everything that determined it, ready for JSON. `defaults` says which values were taken without being given,
        since they are known to work on this model, and their `source` (`kcwb.editing.known`); where nothing is known,
        the layer is a share of the depth. What is in neither is the method's own default, the same for all models.
    deltas
        Layer -> `[M, D]`: the change of the down-projection (input dimension first).
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

    def require_own(self, model: Model) -> None:
        """Raise SettingError unless it was made for this Model object, since it is this one's weights that it changes.

        Equal weights in another object stay as they are: what is then measured there would be the unedited model.
        """
        if model is not self.model:
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
            "digest": self.digest,
            "onto": onto,
        }

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
        saved = _Saved(
            self, {layer: weight.clone() for layer, weight in weights.items()}, model.name, model.digest, model.edits
        )
        joint = hashlib.sha256(f"{model.digest} {self.digest}".encode()).hexdigest()
        _stack(network).append(saved)
        try:
            with torch.no_grad():
                for layer, weight in weights.items():
                    weight.add_(self.deltas[layer])
            _identify(model, f"{model.name} + {self.method}", joint, (*model.edits, self._record(model.digest)))
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
        _identify(self.model, saved.name, saved.digest, saved.edits)
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


_ACTIVE: weakref.WeakKeyDictionary[Network, list[_Saved]] = weakref.WeakKeyDictionary()


def _stack(network: Network) -> list[_Saved]:
    """The edits that are in a network's weights, the latest last."""
    return _ACTIVE.setdefault(network, [])


def _identify(model: Model, name: str, digest: str, edits: tuple[Mapping[str, Any], ...]) -> None:
    """Let a model say whose weights it has. It is frozen for everybody else: this follows a change of its weights."""
    object.__setattr__(model, "name", name)
    object.__setattr__(model, "digest", digest)
    object.__setattr__(model, "edits", edits)


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
        The layer whose MLP is changed (MEMIT: the last of the range). None takes the one that is known to be good on
        this model (`kcwb.editing.known`), else about a third of the depth.
    bound
        The target's loss that the edited weights must get under (`Edit.nll`: on the prompt itself, in nats per token);
        else the edit is refused. `math.inf` takes whatever comes, for statistics over sets of edits, even where the
        target is the answer already.
    seed
        Of prefixes, text and sampling.
    progress
        Reported per step.
    settings
        The method's own, see `RomeSettings`, `MemitSettings`, `TuningSettings`: for example `clamp`, `steps`. Those
        that are not given are the ones known to be good on this model, where there are such (`kcwb.editing.known`; for
        the larger GPT-2 and for GPT-J the published ones), else the method's own defaults. The edit's `parameters` hold
        them all, and say which were taken from where.

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
    chosen, layer, defaults = _settings(model, method, layer, settings)
    templates = _check(model, facts, targets, given, method, layer, bound)
    started = time.perf_counter()
    if isinstance(chosen, MemitSettings):
        fit = memit(model, facts, targets, templates, layer, chosen, seed, progress)
    elif isinstance(chosen, RomeSettings):
        fit = rome(model, facts[0], targets[0], templates[0], layer, chosen, seed, progress)
    else:
        at_end = method == "ft_l"
        fit = fine_tune(model, facts[0], targets[0], templates[0], layer, chosen, at_end=at_end, progress=progress)
    _check_fit(fit, method)
    parameters = {"method": method, "layer": layer, "seed": seed, "model": model.digest, **asdict(chosen)}
    made = Edit(
        model=model,
        facts=facts,
        targets=targets,
        templates=templates,
        method=method,
        layers=tuple(sorted(fit.deltas)),
        parameters={**parameters, "defaults": defaults},
        deltas=fit.deltas,
        losses=pd.DataFrame(fit.losses),
        keys=fit.keys,
        values=fit.values,
        objective=fit.objective,
        seconds=time.perf_counter() - started,
        details=fit.details,
    )
    return _judged(made, fit.contexts, bound)


def default_layer(model: Model, method: str = "rome") -> int:
    """The layer that is edited where none is given: the best one known, else about a third of the depth."""
    return known_settings(model, method)[0]["layer"]


def _settings(
    model: Model, method: str, layer: int | None, given: dict[str, Any]
) -> tuple[Any, int, dict[str, Any]]:  # fmt: skip
    """The method's settings, the layer, and which of them were taken from what is known, with the source."""
    kind = METHODS[choose("The method", method, METHODS)]
    known = list(kind.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise SettingError(f"{method} has no setting {name!r}. {nearest(name, known)}")
    good, source = known_settings(model, method)
    given = given if layer is None else {"layer": layer, **given}
    taken = {name: value for name, value in good.items() if name not in given}
    whole = {**taken, **given}
    layer = whole.pop("layer")
    return kind(**whole), layer, {"source": source, **taken} if taken else {}


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
        already = bound < math.inf and _is_answer(model, Fact(fact.subject, target), template)
        if target == fact.object or already:
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


def _check_fit(fit: Fit, method: str) -> None:
    """Raise EditError unless all numbers are numbers."""
    finite = all(math.isfinite(record["loss"]) for record in fit.losses)
    if not finite or not all(bool(one.isfinite().all()) for one in fit.deltas.values()):
        raise EditError(
            f"The {method} edit diverged: its loss is {fit.objective}. Take a smaller lr. The model is as it was."
        )


def _judged(made: Edit, contexts: Sequence[Sequence[str]], bound: float) -> Edit:
    """The edit with its losses by the edited weights; `contexts` are each request's prompt, and it with prefixes.

    Raises
    ------
    EditError
        If the loss on a prompt itself does not get under the bound.
    """
    asked = [Fact(fact.subject, target) for fact, target in zip(made.facts, made.targets, strict=True)]
    rows = make_rows(made.model, [(fact, text) for fact, texts in zip(asked, contexts, strict=True) for text in texts])
    with made as model:
        each = measured_nll(model, rows).unflatten(0, (len(asked), -1))
    nll, prefixed = float(each[:, 0].max()), float(each[:, 1:].mean(1).max()) if each.shape[1] > 1 else None
    if not nll < bound and not nll == bound == math.inf:
        worst = asked[int(each[:, 0].argmax())]
        raise EditError(
            f"The {made.method} edit did not take: with the edited weights the loss of {worst.object!r:.60} is "
            f"{nll:.2f} nats, and must get under {bound:.2f}. Take more steps, a larger clamp or another layer. The "
            "model is as it was."
        )
    return replace(made, nll=nll, nll_prefixed=prefixed)
