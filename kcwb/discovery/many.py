"""Many draws of one discovery: `discover_many`, which makes an `Ensemble`.

1. Draw everything (`kcwb.discovery.draws`), and sort the draws by the condition that they run on.
2. A method that scores runs once per condition and gives each fact's scores; a draw takes the mean of its facts' and
   chooses edges from that, which is what the method would do on them (a loss is a mean over facts). One that prunes
   runs once per draw.
3. Put the draws together: the edges that at least one of them kept, and which did.

Every run is kept in a folder as soon as it is done, so that an ensemble which is interrupted goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, ablation_kind, make_ablation, register_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.provenance import origin, record
from kcwb.circuits.run import check_same_model
from kcwb.discovery.checkpoint import add_tensor, checkpoint_folder
from kcwb.discovery.draws import Condition, Draw, Plan, make_plan, shares
from kcwb.discovery.methods import METHODS, check_method, check_size
from kcwb.discovery.registry import Method, Settled, register_method
from kcwb.discovery.selection import select_edges
from kcwb.errors import SettingError
from kcwb.files import write_tensors
from kcwb.models.loading import Model
from kcwb.models.worker import WORKER, leave_with_parent, pinned_device, results
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed, at_least
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import Task, check_same_weights
from kcwb.verbs import verb

_VERSION = 1  # of what is computed: raised with every change after which finished runs are of no use


@verb
def discover_many(
    model: Model,
    task: Task,
    method: str = "eap-ig",
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
        As in `kcwb.discover`: any method of the registry.
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
    for value in settled.settings.values():
        if isinstance(value, Circuit):
            check_same_model(model, value)
    check_same_weights(model, task)
    started = time.perf_counter()
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
    runs = _runs(plan, settled, metric)
    kept_runs = _Finished(checkpoint, [run.key(model) for run in runs])
    found: dict[Draw, Tensor] = {}
    means = [_Mean(one.draws, model.graph.exists.shape) for one in (plan, *plan.halves)]
    with track(progress, len(runs), "ensemble") as step:
        for number, output in _outputs(model, runs, kept_runs, executor, step):
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


@dataclass(frozen=True, eq=False)
class _Run:
    """One run, and the draws that come of it: of a method that scores all of a condition, else one."""

    condition: Condition
    metric: str
    method: str
    settings: dict[str, Any]
    counts: tuple[int, ...] | None
    draws: tuple[Draw, ...]

    def compute(self, model: Model, checkpoint: str | bool, progress: Progress = False) -> dict[str, Tensor]:
        """The scores of each fact, or what a search keeps and found."""
        with model.exclusive():
            settled = check_method(self.method, self.metric, self.condition.ablation, **self.settings)
            cuts = make_ablation(model, self.condition.task, self.condition.ablation)
            loss = make_loss(model, self.condition.task.val, self.metric)
            if self.counts is not None:
                loss = loss.resampled(self.counts)
            if settled.method.scores:
                return {"scores": settled.by_fact(model, loss, cuts, progress).float().cpu()}
            if "checkpoint" in settled.method.own:
                settled.settings["checkpoint"] = checkpoint
            pruned = settled.run(model, loss, cuts, progress)
            return {"kept": pruned.kept.cpu(), "scores": pruned.scores.float().cpu()}

    def gives(self, model: Model, output: dict[str, Tensor]) -> bool:
        """Whether an output, read from a file, is one of such a run."""
        exists = model.graph.exists
        scores, kept = output.get("scores"), output.get("kept", exists)
        if scores is None or kept.shape != exists.shape or kept.dtype != torch.bool or bool((kept & ~exists).any()):
            return False
        facts = () if "kept" in output else (len(self.condition.task.val),)
        return METHODS[self.method].scores == ("kept" not in output) and scores.shape == (*facts, *exists.shape)

    def key(self, model: Model) -> str:
        """SHA-256 of all that determines what it computes."""
        prompts, reference = self.condition.task.val, self.condition.task.reference
        settings = {
            name: origin(one) if isinstance(one, Circuit) else one
            for name, one in self.settings.items()
            if name != "checkpoint"
        }
        said = {
            "version": _VERSION, "weights": model.digest, "dtype": str(model.dtype), "metric": self.metric,
            "method": self.method, "settings": settings, "ablation": self.condition.ablation, "counts": self.counts,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
        for one in (prompts, reference):
            for tensor in (one.tokens, one.lengths, one.answers, one.answer_mask, one.foils, one.corrupted):
                add_tensor(digest, tensor)
        return digest.hexdigest()


def _runs(plan: Plan, settled: Settled, metric: str) -> list[_Run]:
    """The runs that all draws need."""
    draws = list(dict.fromkeys(plan.all()))
    name, known = settled.method.name, settled.settings
    if not settled.method.scores:
        return [
            _Run(plan.conditions[one.condition], metric, name, {**known, **one.settings}, one.counts, (one,))
            for one in draws
        ]
    given = {key: value for key, value in known.items() if key in settled.method.own}
    by_condition: dict[int, list[Draw]] = {}
    for one in draws:
        by_condition.setdefault(one.condition, []).append(one)
    return [
        _Run(plan.conditions[number], metric, name, given, None, tuple(some)) for number, some in by_condition.items()
    ]


class _Finished:
    """The folder that finished runs are kept in, as far as it can be written to.

    A disk that is full does not end an ensemble of hours: one warning says so, and it goes on.
    """

    def __init__(self, checkpoint: str | Path | bool, keys: Sequence[str]) -> None:
        if isinstance(checkpoint, bool):
            name = hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
            self.folder = checkpoint_folder() / "ensembles" / name if checkpoint else None
        else:
            self.folder = Path(checkpoint)
        self.keys = keys

    def search(self, number: int) -> str | bool:
        """Where the search of a run keeps its own state."""
        return False if self.folder is None else str(self.folder / f"{self.keys[number]}.search.safetensors")

    def read(self, number: int) -> dict[str, Tensor] | None:
        """A run that was finished before; None if it was not, or its file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return None if self.folder is None else load((self.folder / self.keys[number]).read_bytes())
        except (OSError, SafetensorError):
            return None

    def write(self, number: int, output: dict[str, Tensor]) -> None:
        """Keep a run that is finished."""
        if self.folder is None:
            return
        try:
            write_tensors(self.folder / self.keys[number], output)
        except OSError as error:
            warnings.warn(
                f"Runs cannot be kept in {self.folder} ({error.strerror}): the ensemble goes on, but if it is "
                "interrupted it starts anew.",
                stacklevel=4,
            )
            self.folder = None

    def remove(self) -> None:
        """The ensemble is done: remove what was kept for it, and nothing else."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                for key in self.keys:
                    (self.folder / key).unlink(missing_ok=True)
                self.folder.rmdir()


def _outputs(
    model: Model, runs: Sequence[_Run], kept: _Finished, executor: Executor | None, step: Callable[..., None]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What each run gives, with its number: those that are there first, the others as they are done."""
    missing = []
    for number in range(len(runs)):
        before = kept.read(number)
        if before is None or not runs[number].gives(model, before):
            missing.append(number)
        else:
            yield number, before
    done = _here(model, runs, missing, kept, step) if executor is None else _elsewhere(model, runs, missing, executor)
    for number, output in done:
        kept.write(number, output)
        yield number, output


def _here(
    model: Model, runs: Sequence[_Run], missing: Sequence[int], kept: _Finished, step: Callable[..., None]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for number in missing:

        def tell(done: int, total: int, note: str, number: int = number) -> None:
            step(0, f"run {number + 1}: {done:,} of {total:,}")

        yield number, runs[number].compute(model, kept.search(number), tell)


def _elsewhere(
    model: Model, runs: Sequence[_Run], missing: Sequence[int], executor: Executor
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    if model.edits:
        raise SettingError(f"An executor's workers load {model.name!r} themselves, and have no edits: undo them first.")
    name, dtype = model.name, str(model.dtype).removeprefix("torch.")
    device = "auto" if model.device.type == "cuda" else str(model.device)
    calls = []
    for number in missing:
        run = runs[number]
        kind = type(ablation_kind(run.condition.ablation))
        calls.append((run, name, model.digest, device, dtype, METHODS[run.method], kind))
    kept = "Finished runs are in the checkpoint; the same call goes on from there."
    for i, future in results(executor, _in_worker, calls, kept):
        yield missing[i], future.result()


def _in_worker(
    run: _Run, name: str, digest: str, device: str, dtype: str, method: Method, kind: type[AblationKind]
) -> dict[str, Tensor]:
    """A run in a worker process, which may lack what was registered from outside the package."""
    leave_with_parent()
    register_method(method)
    register_ablation(kind)
    model = WORKER.model(name, pinned_device(device), dtype)
    if not model.has_weights(digest):
        raise SettingError(
            f"A worker that loads {name!r} has weights {model.digest[:12]}, not the {digest[:12]} of the model that "
            "the ensemble is of. Give it a model that workers can load by its name or folder."
        )
    return run.compute(model, False)


def _circuit(model: Model, settled: Settled, draw: Draw, output: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mask of a draw's circuit, without dangling edges, and its scores (NaN where there are none)."""
    graph = model.graph
    if not settled.method.scores:
        return output["kept"], output["scores"]
    scores: Float[Tensor, "S R"] = torch.tensordot(shares(draw.counts), output["scores"], 1)
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
    parameters = {
        name: origin(value) if isinstance(value, Circuit) else value
        for name, value in settled.settings.items()
        if name not in settled.method.unrecorded
    }
    found = {"method": settled.method.name, "metric": metric, "ablation": settled.ablation, "parameters": parameters}
    halves = [[i for i, used in enumerate(half.facts) if used] for half in plan.halves]
    drawn = {"drawn": plan.drawn, "left_out": plan.left_out, "halves": halves}
    seconds = round(time.perf_counter() - started, 3)
    return record(model, task, plan.conditions[0].task.val.facts, seconds=seconds, **found, **how, **drawn)
