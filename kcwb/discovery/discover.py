"""Discovery: one verb for every method, which turns a task into a circuit and records how."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.discovery.acdc import Search, acdc, predict_seconds
from kcwb.discovery.attribution import activation_scores, attribution_scores
from kcwb.discovery.baselines import exact_effects
from kcwb.discovery.checkpoint import checkpoint_folder, fingerprint
from kcwb.discovery.methods import METHODS, SCORING, check_method, check_size
from kcwb.discovery.selection import SELECTIONS, select_edges
from kcwb.discovery.sequential import Pruned
from kcwb.errors import SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Positive
from kcwb.tasks.metrics import Loss, kc_scale, make_loss
from kcwb.tasks.prompts import Task, check_same_weights
from kcwb.verbs import verb
from kcwb.versions import versions


@verb
def discover(
    model: Model,
    task: Task,
    method: str = "eap-ig",
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    edges: Count | None = None,
    threshold: float | None = None,
    select: str | None = None,
    steps: Count | None = None,
    tau: Positive | None = None,
    absolute: bool | None = None,
    within: Circuit | None = None,
    checkpoint: str | Path | bool | None = None,
    progress: Progress = True,
) -> Circuit:
    """Find the circuit with which a model answers a task's D_val.

    Parameters
    ----------
    model, task
        The model, and a task made for it.
    method
        `eap-ig`, `eap`, `eap-ig-activations` (an integral per sender: minutes on the built-in model): attribution, then
        the edges of highest score, without dangling ones. `exact`: the same with the exact effect of each edge (one run
        per edge, so for tiny models). `acdc`: greedy pruning, one edge at a
        time; exact, and minutes on the built-in model.
    metric
        The loss that a cut is judged by: `nll`, `kl` (not for eap: its gradient at the full model is zero) or
        `logit_diff`; nats, averaged over answer tokens and prompts.
    ablation
        What a cut edge delivers: `zero`, `mean`, `resample`, or a kind with settings (`kcwb.circuits.ablation`). None:
        `zero` for acdc (`within` a circuit: what that was found with), `mean` for the others, whose first-order scores
        say little about cutting to zero.
    edges, threshold
        Attribution: how many edges, or the least score kept. Default: 1% of all edges.
    select
        Attribution: `signed` (default), `absolute` or `greedy`, see `kcwb.discovery.selection.select_edges`.
    steps
        eap-ig, eap-ig-activations: points of the integral, default 5.
    tau, absolute
        acdc: the loss increase below which an edge is cut, default 0.01 (`tau_from_kc` converts that of the Knowledge
        Circuits code); and whether its absolute value counts.
    within
        acdc: a circuit whose edges alone are searched, such as an attribution circuit, which takes seconds.
    checkpoint
        acdc: where to keep the state, from which the same call resumes: a path, True for the user's cache (default),
        False for nowhere. It is removed when the search is done.
    progress
        True for a bar, False for none, or a function called with (done, total, note).

    Returns
    -------
    Circuit
        With the scores of all edges that were evaluated, and its provenance.

    Raises
    ------
    SettingError
        If a parameter is out of range, or not one of the method's.
    DataError
        If the metric or the ablation is not defined on the task's prompts.
    """
    given: dict[str, Any] = {"edges": edges, "threshold": threshold, "select": select, "steps": steps}
    given |= {"tau": tau, "absolute": absolute, "within": within, "checkpoint": checkpoint}
    ablation, _ = check_method(method, metric, ablation, steps=steps, within=within)
    parameters = _parameters(model, method, {key: value for key, value in given.items() if value is not None})
    check_same_weights(model, task)
    started = time.perf_counter()
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    kept, scores, found = _run(model, loss, cuts, method, parameters, progress)
    circuit = Circuit(model.graph, kept, scores.float())
    if method != "acdc":
        circuit = circuit.without_dangling()
    provenance = _provenance(model, task, loss, started) | {
        "method": method,
        "metric": metric,
        "ablation": ablation,
        "parameters": parameters,
        **found,
    }
    return replace(circuit, provenance=provenance)


@verb
def score_edges(
    model: Model,
    task: Task,
    method: str = "eap-ig",
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    steps: Count | None = None,
    progress: Progress = True,
) -> Float[Tensor, "S R"]:
    """The scores that an attribution method gives to all edges, `[S, R]`; parameters as in `discover`."""
    choose("The method", method, SCORING)
    ablation, _ = check_method(method, metric, ablation, steps=steps)
    check_same_weights(model, task)
    cuts = make_ablation(model, task, ablation)
    return loss_scores(model, make_loss(model, cuts.usable(task.val), metric), cuts, method, steps, progress)


def loss_scores(
    model: Model,
    loss: Loss,
    cuts: Ablation,
    method: str = "eap-ig",
    steps: int | None = None,
    progress: Progress = False,
) -> Float[Tensor, "S R"]:
    """As `score_edges`, of a loss on any prompts."""
    settled = check_method(method, loss.metric, steps=steps)
    if method == "exact":
        return exact_effects(model, loss, cuts, progress=progress)
    score = activation_scores if method == "eap-ig-activations" else attribution_scores
    return score(model, loss, cuts, steps=settled.steps, progress=progress)


@verb
def tau_path(
    model: Model,
    task: Task,
    taus: Sequence[Positive],
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    absolute: bool = False,
    within: Circuit | None = None,
    progress: Progress = True,
) -> dict[float, Circuit]:
    """ACDC at several thresholds, which share the ablation, the loss and the unpruned run.

    Parameters
    ----------
    taus
        The thresholds; parameters otherwise as in `discover`.

    Returns
    -------
    dict
        tau -> the circuit that `discover(..., "acdc", tau=tau)` gives, in the order of `taus`.
    """
    for tau in taus:
        _parameters(model, "acdc", {"tau": tau, "within": within} if within else {"tau": tau})
    search = _search(model, task, metric, ablation, absolute, within)
    circuits = {}
    for tau in taus:
        started = time.perf_counter()
        pruned = acdc(search.again(tau), progress=progress)
        provenance = _provenance(model, task, search.loss, started) | {
            "method": "acdc",
            "metric": metric,
            "ablation": str(search.ablation.kind),
            "parameters": {"tau": tau, "absolute": absolute, "within": _origin(within)},
            **_acdc_report(pruned, search.loss, tau),
        }
        circuits[tau] = Circuit(model.graph, pruned.kept, pruned.increases, provenance)
    return circuits


@verb
def tau_from_kc(task: Task, tau_kc: Positive) -> float:
    """The tau at which `acdc` prunes by nll as the Knowledge Circuits code (arXiv 2405.17969) does at `tau_kc`.

    Its loss divides by all T - 1 positions of prompt and answer, ours by the answer's tokens: tau = tau_kc (T - 1) /
    tokens, on D_val. A circuit that acdc found by nll records both (`tau` among its parameters, and `tau_kc`).
    """
    return tau_kc * kc_scale(task.val)


@verb
def predict(
    model: Model,
    task: Task,
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    within: Circuit | None = None,
) -> float:
    """Roughly how many seconds `discover(model, task, "acdc", ...)` will take, from timing a few of its candidates."""
    return predict_seconds(_search(model, task, metric, ablation, False, within))


def _search(
    model: Model, task: Task, metric: str, ablation: str | AblationKind | None, absolute: bool, within: Circuit | None
) -> Search:
    """An ACDC search that is about to begin, at the default tau."""
    ablation, _ = check_method("acdc", metric, ablation, within=within)
    check_same_weights(model, task)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    settings = {"tau": METHODS["acdc"].defaults["tau"], "absolute": absolute}
    return Search(model, loss, cuts, within=None if within is None else within.kept, **settings)


def _origin(within: Circuit | None) -> dict[str, Any] | None:
    """Which circuit a search was kept within, and how that was found, in brief."""
    if within is None:
        return None
    found = {key: within.provenance[key] for key in ("method", "ablation", "metric") if key in within.provenance}
    return {"digest": within.digest, "edges": within.n_edges, **found}


def _checkpoint_path(search: Search, wanted: str | Path | bool) -> Path | None:
    if isinstance(wanted, bool):
        return checkpoint_folder() / f"{fingerprint(search)}.safetensors" if wanted else None
    return Path(wanted)


def _acdc_report(pruned: Pruned, loss: Loss, tau: float) -> dict[str, Any]:
    report = {"loss": pruned.loss, "evaluations": pruned.evaluations, "near_ties": pruned.near_ties}
    if loss.metric == "nll":
        report["tau_kc"] = tau / kc_scale(loss.prompts)
    return {**report, "order": "output to input; heads last to first; v, k, q"}


def _parameters(model: Model, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's parameters, checked, with defaults filled in."""
    defaults = METHODS[method].defaults
    for name in given:
        if name not in defaults:
            raise SettingError(f"{method} takes {', '.join(defaults)}; {name} is not one of them.")
    parameters = {**defaults, **given}
    if method == "acdc":
        if parameters["within"] is not None:
            check_same_model(model, parameters["within"])
        return parameters
    choose("The selection", parameters["select"], SELECTIONS)
    if "edges" in given and "threshold" in given:
        raise SettingError("Give either edges (how many) or threshold (the least score), not both.")
    unused = "edges" if "threshold" in given else "threshold"
    if unused == "threshold":
        parameters["edges"] = check_size(model.graph, parameters["edges"], model.name)
    del parameters[unused]
    return parameters


def _run(
    model: Model, loss: Loss, cuts: Any, method: str, parameters: dict[str, Any], progress: Progress
) -> tuple[Bool[Tensor, "S R"], Float[Tensor, "S R"], dict[str, Any]]:
    """Kept edges, scores, and what else the method reports."""
    if method == "acdc":
        within, checkpoint = parameters["within"], parameters.pop("checkpoint")
        settings = {"tau": parameters["tau"], "absolute": parameters["absolute"]}
        search = Search(model, loss, cuts, within=None if within is None else within.kept, **settings)
        pruned = acdc(search, progress=progress, checkpoint=_checkpoint_path(search, checkpoint))
        parameters["within"] = _origin(within)
        return pruned.kept, pruned.increases, _acdc_report(pruned, loss, search.tau)
    scores = loss_scores(model, loss, cuts, method, parameters.get("steps"), progress)
    selection: dict[str, Any] = {key: parameters.get(key) for key in ("edges", "threshold", "select")}
    kept = select_edges(model.graph, scores, **selection)
    return kept, scores.masked_fill(~model.graph.exists, torch.nan), {}


def _provenance(model: Model, task: Task, loss: Loss, started: float) -> dict[str, Any]:
    return {
        "model": {
            "name": model.name,
            "digest": model.digest,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "prepend_bos": model.prepend_bos,
            "d_model": model.network.d_model,
        },
        "relation": {"name": task.relation.name, "digest": task.relation.digest},
        "template": task.template,
        "n": task.n,
        "seed": task.seed,
        "facts": [[fact.subject, fact.object] for fact in loss.prompts.facts],
        "seconds": round(time.perf_counter() - started, 3),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
