"""Many draws of one discovery: `discover_many`, which makes an `Ensemble`.

1. Draw everything (`kcwb.discovery.draws`), and sort the draws by the condition that they run on.
2. A method that scores runs once per condition and gives each fact's scores; a draw takes the mean of its facts' and
   chooses edges from that, which is what the method would do on them (a loss is a mean over facts). One that prunes
   runs once per draw.
3. Put the draws together: the edges that at least one of them kept, and which did.

Every run is kept in a folder as soon as it is done, so that an ensemble which is interrupted goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.circuits.ablation import AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.provenance import record
from kcwb.discovery.discover import discover, find_circuits
from kcwb.discovery.draws import Draw, Plan, make_plan, shares
from kcwb.discovery.methods import check_method, check_size
from kcwb.discovery.registry import DEFAULT, Settled
from kcwb.discovery.runs import Finished, outputs, runs_of
from kcwb.discovery.selection import select_edges
from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed, at_least
from kcwb.tasks.task import Task
from kcwb.verbs import verb


@verb
def discover_many(
    model: Model,
    task: Task,
    method: str = DEFAULT,
    *,
    draws: Annotated[int, at_least(2)] = 100,
    vary: Sequence[str] | None = None,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    levels: Count = 3,
    twins: Natural | None = None,
    halves: bool | None = None,
    shuffled: bool = False,
    seed: Seed = 0,
    executor: Executor | None = None,
    checkpoint: str | Path | bool = True,
    progress: Progress = True,
    **settings: Any,
) -> Ensemble:
    """Find a circuit many times, each time with something else left to chance: how sure is each of its edges.

    Parameters
    ----------
    model, task, method, metric, ablation, settings
        As in `kcwb.discover`: any method of the registry. `select="tuned"` is tuned once, on all facts of D_val.
    draws
        How many independent draws the inclusion probabilities rest on.
    vary
        What is left to chance, some of `facts`, `template`, `setting`, `ablation`, `order` (see
        `kcwb.discovery.draws`); None for all that have more than one value, and a warning if wordings have not.
    levels
        Wordings, and draws of the ablation, at most; a method that scores runs once for each combination.
    twins
        How many draws are repeated once for each source, with this source alone drawn anew: what the split by source
        rests on (`Ensemble.sources`). None: all draws where a draw costs no run, else a quarter of them.
    halves
        Whether to draw as many circuits of each half of the facts, which `Ensemble.curve` tests on the other half.
        None: where a draw costs no run.
    shuffled
        Deal the answers out anew, differently for each condition (`kcwb.tasks.variants.with_shuffled_answers`): what
        is found then is what the method finds of nothing, for `Ensemble.bound(null=...)`.
    seed
        Of all draws.
    executor
        Any `concurrent.futures` executor, as in `kcwb.sweep.sweep`; its workers load the model by its name. None runs
        here.
    checkpoint
        Where finished runs are kept until the ensemble is: a folder, True for the user's cache (default), False for
        nowhere. The same call goes on from them.
    progress
        Reported per run.

    Returns
    -------
    Ensemble
        The same for the same arguments, on any executor.

    Raises
    ------
    SettingError
        If a setting cannot be meant, a source that was asked for has but one value, or an executor's workers would
        load other weights than the model's.
    DataError
        If fewer than four facts are known in every wording, or have partners where the ablation needs them.
    KcwbError
        If the executor's workers died. What was finished is in the checkpoint: call again.
    """
    settled = check_method(method, metric, ablation, **settings)
    if settled.settings.get("stable") is not None:
        raise SettingError("stable is for a single circuit: an ensemble's pi says how sure each edge is.")
    started = time.perf_counter()
    find_circuits(model, task, settled, metric, progress)
    scores = settled.method.scores
    plan = make_plan(
        model,
        task,
        settled,
        vary,
        draws=draws,
        twins=min(draws, (draws if scores else max(1, draws // 4)) if twins is None else twins),
        levels=levels,
        halves=scores if halves is None else halves,
        shuffled=shuffled,
        seed=seed,
    )
    if settled.settings.get("select") == "tuned":
        whole = discover(model, task, method, metric=metric, ablation=ablation, progress=progress, **settings)
        settled.settings["select"] = whole.provenance["parameters"]["select"]
    runs = runs_of(plan, settled, metric)
    kept_runs = Finished(checkpoint, [run.key(model) for run in runs])
    found: dict[Draw, Tensor] = {}
    means = [_Mean(one.draws, model.graph.exists.shape) for one in (plan, *plan.halves)]
    with track(progress, len(runs), "ensemble") as step:
        for number, output in outputs(model, runs, kept_runs, executor, step):
            for draw in runs[number].draws:
                kept, of_edges = _circuit(model, settled, draw, output)
                found[draw] = kept.flatten().nonzero()[:, 0]
                for mean in means:
                    mean.take(draw, of_edges)
            step()
    how = {"draws": draws, "levels": levels, "shuffled": shuffled, "ensemble_seed": seed}
    provenance = _provenance(model, task, settled, metric, plan, how, started)
    whole = _ensemble(model, plan, found, means, provenance)
    kept_runs.remove()
    return whole


def _circuit(model: Model, settled: Settled, draw: Draw, output: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mask of a draw's circuit, without dangling edges, and its scores (NaN where there are none)."""
    graph = model.graph
    if not settled.method.scores:
        return output["kept"], output["scores"]
    scores: Float[Tensor, "S R"] = output["scores"]
    if settled.method.additive:
        scores = torch.tensordot(shares(draw.counts), scores, 1)
    chosen = {name: settled.settings[name] for name in ("edges", "threshold", "select")} | dict(draw.settings)
    del chosen["edges" if chosen["threshold"] is not None else "threshold"]
    if "edges" in chosen:
        chosen["edges"] = check_size(graph, chosen["edges"], model.name)
    kept = select_edges(graph, scores, **chosen)
    return Circuit(graph, kept).without_dangling().kept, scores


class _Mean:
    """The mean score of every edge over some draws, of those that evaluated it."""

    def __init__(self, draws: Sequence[Draw], shape: tuple[int, ...]) -> None:
        self._draws = set(draws)
        self._sum, self._number = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.long)

    def take(self, draw: Draw, scores: Float[Tensor, "S R"]) -> None:
        """Take in a draw's scores, if it is one of the draws."""
        if draw in self._draws:
            self._sum += scores.nan_to_num()
            self._number += ~scores.isnan()

    def at(self, places: Int[Tensor, "M 2"]) -> Float[Tensor, " M"]:
        """The mean at some edges; NaN where no draw evaluated them."""
        total, number = self._sum[*places.T], self._number[*places.T]
        return torch.where(number > 0, total / number, torch.nan).float()


def _ensemble(
    model: Model, plan: Plan, found: dict[Draw, Tensor], means: Sequence[_Mean], provenance: dict[str, Any]
) -> Ensemble:
    """The draws put together; its halves likewise, over edges of their own."""
    graph = model.graph
    drawn = [*plan.draws, *(draw for some in plan.twins.values() for draw in some)]
    ever = torch.cat([found[draw] for draw in drawn]).unique()

    def masks(draws: Sequence[Draw]) -> Tensor:
        return torch.stack([torch.isin(ever, found[draw]) for draw in draws])

    places = torch.stack([ever // graph.n_receivers, ever % graph.n_receivers], 1)
    twins = {name: masks(some) for name, some in plan.twins.items()}
    halves = tuple(
        _ensemble(model, half, found, [mean], provenance) for half, mean in zip(plan.halves, means[1:], strict=True)
    )
    return Ensemble(graph, places, masks(plan.draws), twins, means[0].at(places), provenance, halves)


def _provenance(
    model: Model, task: Task, settled: Settled, metric: str, plan: Plan, how: dict[str, Any], started: float
) -> dict[str, Any]:
    """All that determined the ensemble; `drawn` and `halves` number the facts in the order in which they stand."""
    halves = [[i for i, used in enumerate(half.facts) if used] for half in plan.halves]
    drawn = {"drawn": plan.drawn, "left_out": plan.left_out, "halves": halves}
    found = {"seconds": round(time.perf_counter() - started, 3), **settled.recorded(metric)}
    return record(model, task, plan.conditions[0].task.val.facts, **found, **how, **drawn)
