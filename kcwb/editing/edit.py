"""One verb for all editors, and the edit that it returns: a change of weights that can be put in and taken out.

    with kcwb.edit(model, Fact("France", "Paris"), "Rome", template="The capital of {} is") as edited:
        ...  # `edited` is `model`, its weights changed
    # here the weights are bit for bit what they were

Finding an edit changes nothing. While an edit is in, `model.digest` and `model.name` say so, since whatever is found
then (circuits, tasks, cached results) is not the unedited model's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import pandas as pd
import torch

from kcwb.editing.change import Edit, EditError, lost_by_rounding
from kcwb.editing.known import known_settings
from kcwb.editing.methods.base import EditMethod, Request
from kcwb.editing.partial_runs import make_rows, measured_nll
from kcwb.editing.registry import edit_method, many_at_once
from kcwb.errors import SettingError, nearest
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Limit, Seed
from kcwb.tasks.ranks import rank_of
from kcwb.tasks.relations import Fact, check_template
from kcwb.tasks.subjects import blank, places
from kcwb.verbs import verb


@verb
def edit(
    model: Model,
    fact: Fact | Sequence[Fact],
    target: str | Sequence[str],
    method: str = "rome",
    *,
    template: str | Sequence[str],
    layer: int | None = None,
    bound: Limit = 1.0,
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> Edit:
    """Find a change of weights after which the model gives a fact's subject another object. Changes nothing yet.

    Parameters
    ----------
    model
        The model, edited already or not.
    fact, target
        The fact as it is, and the object that it is to have; `memit` and `alphaedit` take sequences of both.
    method
        The name of an editor (`kcwb.editing.registry`): `rome`, `memit`, `alphaedit`, `ft_m`, `ft_l`.
    template
        How the fact is asked, with `{}` in it, or the subject itself once, as whole words; one for all facts, or one
        for each.
    layer
        The layer whose MLP is changed (of a range, as MEMIT's, the last). None takes the one that is known to be good
        on this model (`kcwb.editing.known`), else about a third of the depth.
    bound
        The target's loss that the edited weights must get under (`Edit.nll`: on the prompt itself, in nats per token);
        else the edit is refused. `math.inf` takes whatever comes, for statistics over sets of edits, even where the
        target is the answer already.
    settings
        The editor's own (`EditMethod.settings`): for example `clamp`, `steps`. Those that are not given are the ones
        known to be good on this model, where there are such (`kcwb.editing.known`; for the larger GPT-2 and for GPT-J
        the published ones), else the editor's own defaults. The edit's `parameters` hold them all, and say which were
        taken from where.

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
    editor, chosen, layer, defaults = settled(model, method, layer, settings)
    requests = _requests(model, facts, targets, given, editor, bound)
    started = time.perf_counter()
    fit = editor.function(model, requests, layer, chosen, seed, progress)
    loss = next((one["loss"] for one in fit.losses if not math.isfinite(one["loss"])), fit.objective)
    if not math.isfinite(loss) or not all(bool(one.isfinite().all()) for one in fit.deltas.values()):
        raise EditError(f"The {method} edit diverged: its loss is {loss}. Take a smaller lr. The model is as it was.")
    parameters = {"method": method, "layer": layer, "seed": seed, "model": model.digest, **asdict(chosen)}
    made = Edit(
        model=model,
        facts=facts,
        targets=targets,
        templates=tuple(request.template for request in requests),
        method=method,
        layers=tuple(sorted(fit.deltas)),
        parameters={**parameters, "defaults": defaults},
        deltas=fit.deltas,
        losses=pd.DataFrame(fit.losses),
        keys=fit.keys,
        values=fit.values,
        objective=fit.objective,
        seconds=time.perf_counter() - started,
        kept=fit.kept,
        rounding=lost_by_rounding(model.network, fit.deltas),
        details=fit.details,
    )
    return _judged(made, requests, fit.contexts, bound)


@verb
def default_layer(model: Model, method: str = "rome") -> int:
    """The layer that is edited where none is given: the best one known, else about a third of the depth."""
    return known_settings(model, method)[0]["layer"]


def settled(
    model: Model, method: str, layer: int | None, given: Mapping[str, Any]
) -> tuple[EditMethod, Any, int, dict[str, Any]]:
    """The editor, its settings, the layer, and which of these were taken from what is known, with the source."""
    editor = edit_method(method)
    model.network.require("editing")
    known = [one.name for one in fields(editor.settings)]
    for name in given:
        if name not in known:
            raise SettingError(f"{editor.name} has no setting {name!r}. {nearest(name, known)}")
    good, source = known_settings(model, editor.name)
    given = given if layer is None else {"layer": layer, **given}
    taken = {name: value for name, value in good.items() if name not in given}
    whole = {**taken, **given}
    chosen: int = whole.pop("layer")
    if not 0 <= chosen < model.graph.n_layers:
        raise SettingError(f"layer={chosen}: {model.name} has layers 0 to {model.graph.n_layers - 1}.")
    return editor, editor.settings(**whole), chosen, {"source": source, **taken} if taken else {}


def check_edits(model: Model, method: str, *layers: int | None, **more: Any) -> None:
    """Refuse, before anything runs, what `edit` would refuse of any fact; as it does."""
    own = {name: value for name, value in more.items() if name not in ("bound", "seed", "progress")}
    for layer in {own.pop("layer", None), *layers}:
        settled(model, method, layer, own)


def _requests(
    model: Model, facts: Sequence[Fact], targets: Sequence[str], templates: Sequence[str], editor: EditMethod,
    bound: float,
) -> list[Request]:  # fmt: skip
    """Refuse what cannot be meant; what is asked for, each template with `{}`."""
    if not facts or not len(facts) == len(targets) == len(templates):
        raise SettingError(
            f"{len(facts)} facts, {len(targets)} targets, {len(templates)} templates: give as many of each, at least 1."
        )
    if len(facts) > 1 and not editor.many:
        raise SettingError(f"{editor.name} changes one fact at a time; {many_at_once()} takes {len(facts)}.")
    for fact in facts:
        if fact.span is not None:
            raise SettingError(
                f"{fact.subject!r:.60} is a whole prompt, and an edit is about a subject: give "
                f"Fact({fact.named or 'the subject'!r:.60}, {fact.object!r:.60}) and a template with {{}} in its place."
            )
    if len({fact.subject for fact in facts}) < len(facts):
        raise SettingError("A subject stands in more than one of the facts; edit those one after the other.")
    filled = map(_with_gap, facts, templates)
    requests = [Request(*one) for one in zip(facts, targets, filled, strict=True)]
    for request in requests:
        fact, target, template = request
        if not target.strip() or target != target.strip():
            raise SettingError(f"The target {target!r:.60} is empty, or starts or ends with white space.")
        if target in fact.right or (bound < math.inf and is_answer(model, request.wanted, template)):
            raise SettingError(
                f"The target {target!r:.60} is already the answer to {template.replace('{}', fact.subject)!r:.120}; "
                "choose another."
            )
    return requests


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
def is_answer(model: Model, fact: Fact, template: str) -> bool:
    """Whether each token of the object is already the model's first choice."""
    rows = make_rows(model, [(fact, template)])
    logits = model.logits(rows.tokens)[0, rows.positions[0]]
    return bool((rank_of(logits, rows.answers[0]) == 1).all())


def _judged(made: Edit, requests: Sequence[Request], contexts: Sequence[Sequence[str]], bound: float) -> Edit:
    """The edit with its losses by the edited weights; `contexts` are each request's prompt, and it with prefixes."""
    asked = [request.wanted for request in requests]
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
