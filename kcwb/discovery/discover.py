"""Discovery: one verb for every method, which turns a task into a circuit and records how."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, ablation_kind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import record
from kcwb.circuits.run import check_same_model
from kcwb.discovery.acdc import Search, run
from kcwb.discovery.checkpoint import Checkpoint, usual_path
from kcwb.discovery.methods import METHODS, Pruning, check_method, check_size, scoring
from kcwb.discovery.methods.acdc import pruning
from kcwb.discovery.registry import DEFAULT, Settled, read_within
from kcwb.discovery.selection import select_edges, sure_signs
from kcwb.discovery.tuning import Tuning
from kcwb.errors import DataError, SettingError, choose
from kcwb.models.loading import Model
from kcwb.models.memory import noting_pieces
from kcwb.progress import Progress
from kcwb.settings import Positive
from kcwb.tasks.metrics import Loss, kc_scale, make_loss
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb


@verb
@noting_pieces()
def discover(
    model: Model,
    task: Task,
    method: str = DEFAULT,
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    progress: Progress = True,
    **settings: Any,
) -> Circuit:
    """Find the circuit with which a model answers a task's D_val.

    Parameters
    ----------
    model, task
        The model, and a task made for it.
    method
        One of `kcwb.discovery.registry.METHODS`. `gim` (default), `eap-ig`, `eap`, `relp`, `ceap`, `eap-ig-activations`
        (an integral per sender: minutes on the built-in model): attribution, then the edges of highest score, without
        dangling ones. `ig-prune`: attribution again and again among the edges that are left. `exact`: the exact effect
        of each edge (one run per edge, so for tiny models). `acdc`: greedy pruning, one edge at a time; exact, and
        minutes on the built-in model.
    metric
        The loss that a cut is judged by: `nll`, `kl` (not for eap: its gradient at the full model is zero) or
        `logit_diff`; nats, averaged over answer tokens and prompts.
    ablation
        What a cut edge delivers: `zero`, `mean`, `resample`, or a kind with settings (`kcwb.circuits.ablation`). None:
        `zero` for acdc (`within` a circuit: what that was found with), `mean` for the others, whose first-order scores
        say little about cutting to zero.
    progress
        True for a bar, False for none, or a function called with (done, total, note).
    edges, threshold
        Of methods that score every edge: how many edges, or the least score kept. Default: 1% of all edges.
    select
        Of the same: `signed`, `absolute`, a number between (0 to 1), `greedy` or `optimal`, see
        `kcwb.discovery.selection.select_edges`; or `tuned` (default), the number that does best on D_val, which is
        recorded.
    stable
        Of the same, where scores are means over facts: only edges whose score has the same sign in this share of
        bootstrap resamples of the facts, such as .95; the others' scores are 0. None (default): all edges.
    steps
        eap-ig, eap-ig-activations, ceap, gim: points of the integral, default 5; ig-prune: 4; relp: 1, the clean run.
    tau, absolute
        acdc: the loss increase below which an edge is cut, default 0.01 (`tau_from_kc` converts that of the Knowledge
        Circuits code); and whether its absolute value counts.
    within
        acdc: a circuit whose edges alone are searched, such as an attribution circuit, which takes seconds. Or one in
        words: `gim:2000` is that of 2,000 edges which `gim` finds in the same metric under the same ablation.
    order
        acdc: the seed that the order of a layer's heads is drawn from; None for the last to the first.
    checkpoint
        acdc: where to keep the state, from which the same call resumes: a path, True for the user's cache (default),
        False for nowhere. It is removed when the search is done.
    settings
        Those above are of the methods that come with the package; one of your own takes what its function does.

    Returns
    -------
    Circuit
        With the scores of all edges that were evaluated, and its provenance.

    Raises
    ------
    SettingError
        If a parameter is out of range, or not one of the method's.
    DataError
        If the metric or the ablation is not defined on the task's prompts: the mean not on a single one.
    """
    settled, cuts, loss, started = _begin(model, task, method, metric, ablation, settings, progress)
    if settled.method.prunes:
        return _pruned(model, task, settled, loss, started, settled.run(model, loss, cuts, progress))
    scores, sure = _scored(model, settled, loss, cuts, progress)
    chosen: dict[str, Any] = {name: settled.settings.get(name) for name in ("edges", "threshold", "select")}
    if chosen["select"] == "tuned":
        del chosen["select"]
        chosen["select"] = settled.settings["select"] = Tuning(model, loss, cuts).share(scores, among=sure, **chosen)
    kept = select_edges(model.graph, scores, among=sure, **chosen)
    scored = Circuit(model.graph, kept, scores.masked_fill(~model.graph.exists, torch.nan).float())
    return replace(scored.without_dangling(), provenance=_provenance(model, task, settled, loss, started))


@verb
def score_edges(
    model: Model,
    task: Task,
    method: str = DEFAULT,
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    progress: Progress = True,
    **settings: Any,
) -> Float[Tensor, "S R"]:
    """The scores that a method gives to all edges, `[S, R]`; parameters as in `discover`."""
    choose("The method", method, scoring())
    settled, cuts, loss, _ = _begin(model, task, method, metric, ablation, settings, progress)
    return _scored(model, settled, loss, cuts, progress)[0]


@verb
@noting_pieces()
def tau_path(
    model: Model,
    task: Task,
    taus: Sequence[Positive],
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    absolute: bool = False,
    within: Circuit | str | None = None,
    checkpoint: bool = True,
    progress: Progress = True,
) -> dict[float, Circuit]:
    """ACDC at several thresholds, which share the ablation, the loss and the unpruned run.

    Parameters
    ----------
    taus
        The thresholds; parameters otherwise as in `discover`.
    checkpoint
        Whether to keep in the user's cache, until all is done, how far each search is: the same call goes on from it.

    Returns
    -------
    dict
        tau -> the circuit that `discover(..., "acdc", tau=tau)` gives, in the order of `taus`.
    """
    same = {"absolute": absolute, "within": within}
    settled, cuts, loss, _ = _begin(model, task, "acdc", metric, ablation, same, progress)
    known = settled.settings
    search = Search(model, loss, cuts, tau=known["tau"], absolute=absolute, within=known["within"])
    circuits, states = {}, []
    for tau in taus:
        started = time.perf_counter()
        again = search.again(tau)
        states.append(Checkpoint(usual_path(again), again) if checkpoint else None)
        found = pruning(again, run(again, states[-1], progress))
        at_tau = settled._replace(settings=known | {"tau": tau})
        circuits[tau] = _pruned(model, task, at_tau, loss, started, found)
    for state in states:
        if state is not None:
            state.remove()
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
    method: str = "acdc",
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    **settings: Any,
) -> float:
    """Roughly how many seconds `discover` will take, for acdc from timing a few candidates; parameters as there."""
    seconds = METHODS[choose("The method", method, METHODS)].seconds
    if seconds is None:
        raise SettingError(f"{method} does not say how long it takes; its progress does.")
    settled, cuts, loss, _ = _begin(model, task, method, metric, ablation, settings)
    return seconds(model, loss, cuts, **settled.settings)


def _begin(
    model: Model, task: Task, method: str, metric: str, ablation: str | AblationKind | None, settings: dict[str, Any],
    progress: Progress = False,
) -> tuple[Settled, Ablation, Loss, float]:  # fmt: skip
    """What is run, and on what; refused, before anything is computed, if it cannot be meant."""
    settled = check_method(method, metric, ablation, **settings)
    known = settled.settings
    if settled.method.scores:
        del known["edges" if known["threshold"] is not None else "threshold"]
        if known["stable"] is None:
            del known["stable"]
    if "edges" in known:
        known["edges"] = check_size(model.graph, known["edges"], model.name)
    started = time.perf_counter()
    prompts = [*task.val.own, *task.reference.own]
    if ablation_kind(settled.ablation).name == "mean" and all(one == prompts[0] for one in prompts):
        raise DataError(
            f"mean ablation averages over the prompts of {task.relation.name}, and there is only one: cut edges would "
            "deliver what the full model has there. Use zero ablation, or a relation with more facts."
        )
    find_circuits(model, task, settled, metric, progress)
    cuts = make_ablation(model, task, settled.ablation)
    return settled, cuts, make_loss(model, cuts.usable(task.val), metric), started


def _scored(
    model: Model, settled: Settled, loss: Loss, cuts: Ablation, progress: Progress
) -> tuple[Float[Tensor, "S R"], Bool[Tensor, "S R"] | None]:
    """The scores of all edges; and if they are to be stable, which are, the scores of the others being 0."""
    stable = settled.settings.get("stable")
    if stable is None:
        return settled.run(model, loss, cuts, progress), None
    each = settled.by_fact(model, loss, cuts, progress)
    sure = sure_signs(each, stable)
    return each.mean(0) * sure, sure


def find_circuits(model: Model, task: Task, settled: Settled, metric: str, progress: Progress = False) -> None:
    """Find the circuit that a setting such as `gim:2000` names; refuse a task, or a circuit, of another model."""
    known = settled.settings
    for value in known.values():
        if isinstance(value, Circuit):
            check_same_model(model, value)
    check_same_weights(model, task)
    if isinstance(known.get("within"), str):
        method, edges = read_within(known["within"])
        same: dict[str, Any] = {"metric": metric, "ablation": settled.ablation, "progress": progress}
        known["within"] = discover(model, task, method.name, edges=edges, **same)


def _pruned(model: Model, task: Task, settled: Settled, loss: Loss, started: float, found: Pruning) -> Circuit:
    provenance = _provenance(model, task, settled, loss, started) | dict(found.report)
    return Circuit(model.graph, found.kept, found.scores.float(), provenance)


def _provenance(model: Model, task: Task, settled: Settled, loss: Loss, started: float) -> dict[str, Any]:
    """All that determined a circuit."""
    seconds = round(time.perf_counter() - started, 3)
    return record(model, task, loss.prompts.facts, seconds=seconds, **settled.recorded(loss.metric))
