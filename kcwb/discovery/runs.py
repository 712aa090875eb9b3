"""The runs that an ensemble's draws need: what each computes, here or on an executor, and where finished ones are kept.

A method whose scores of some facts are the mean of each one's runs once per condition; another that scores, once for
all draws of the same facts; one that prunes, once per draw (`kcwb.discovery.many`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, ablation_kind, make_ablation, register_ablation
from kcwb.discovery.checkpoint import add_tensors, checkpoint_folder
from kcwb.discovery.draws import Condition, Draw, Plan
from kcwb.discovery.methods import METHODS, check_method
from kcwb.discovery.registry import Method, Settled, recorded, register_method
from kcwb.errors import SettingError, warn
from kcwb.files import write_tensors
from kcwb.models.loading import Model
from kcwb.models.worker import WORKER, leave_with_parent, pinned_device, results
from kcwb.progress import Progress
from kcwb.tasks.metrics import make_loss

_VERSION = 1  # of what is computed: raised with every change after which finished runs are of no use


@dataclass(frozen=True, eq=False)
class Run:
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
                run = settled.by_fact if settled.method.additive else settled.run
                return {"scores": run(model, loss, cuts, progress).float().cpu()}
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
        method = METHODS[self.method]
        facts = (len(self.condition.task.val),) if method.scores and method.additive else ()
        return method.scores == ("kept" not in output) and scores.shape == (*facts, *exists.shape)

    def key(self, model: Model) -> str:
        """SHA-256 of all that determines what it computes."""
        prompts, reference = self.condition.task.val, self.condition.task.reference
        said = {
            "version": _VERSION, "weights": model.digest, "dtype": str(model.dtype), "metric": self.metric,
            "method": self.method, "settings": recorded(self.settings, ["checkpoint"]),
            "ablation": self.condition.ablation, "counts": self.counts,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
        for one in (prompts, reference):
            asked = (one.tokens, one.lengths, one.answers, one.answer_mask, one.foils, one.corrupted, *one.further)
            add_tensors(digest, asked)
        return digest.hexdigest()


def runs_of(plan: Plan, settled: Settled, metric: str) -> list[Run]:
    """The runs that all draws need."""
    draws = list(dict.fromkeys(plan.all()))
    name, known = settled.method.name, settled.settings
    if not settled.method.scores:
        return [
            Run(plan.conditions[one.condition], metric, name, {**known, **one.settings}, one.counts, (one,))
            for one in draws
        ]
    given = {key: value for key, value in known.items() if key in settled.method.own}
    alike: dict[tuple[int, tuple[int, ...] | None], list[Draw]] = {}
    for one in draws:
        alike.setdefault((one.condition, None if settled.method.additive else one.counts), []).append(one)
    return [
        Run(plan.conditions[number], metric, name, given, counts, tuple(some))
        for (number, counts), some in alike.items()
    ]


class Finished:
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
            warn(
                f"Runs cannot be kept in {self.folder} ({error.strerror}): the ensemble goes on, but if it is "
                "interrupted it starts anew."
            )
            self.folder = None

    def remove(self) -> None:
        """The ensemble is done: remove what was kept for it, and nothing else."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                for key in self.keys:
                    (self.folder / key).unlink(missing_ok=True)
                self.folder.rmdir()


def outputs(
    model: Model, runs: Sequence[Run], kept: Finished, executor: Executor | None, step: Callable[..., None]
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
    model: Model, runs: Sequence[Run], missing: Sequence[int], kept: Finished, step: Callable[..., None]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for number in missing:

        def tell(done: int, total: int, note: str, number: int = number) -> None:
            step(0, f"run {number + 1}: {done:,} of {total:,}")

        yield number, runs[number].compute(model, kept.search(number), tell)


def _elsewhere(
    model: Model, runs: Sequence[Run], missing: Sequence[int], executor: Executor
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
    run: Run, name: str, digest: str, device: str, dtype: str, method: Method, kind: type[AblationKind]
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
