"""One cell of a sweep, and the worker that computes it; see `kcwb.sweep.what`."""

from __future__ import annotations

import functools
import getpass
import hashlib
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kcwb.circuits.ablation import AblationKind, register_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.registry import Method, register_method
from kcwb.evaluation.completeness import completeness
from kcwb.models.loading import Model, load_model
from kcwb.tasks.prompts import Task, make_task
from kcwb.tasks.relations import Relation

#: The numbers of a finished cell, in the order of the table's columns.
NUMBERS = ("n_edges", "n_nodes", "share", "facts", "hit_val", "hit_test", "full_hit_test", "nll_val", "full_nll_val")


@dataclass(frozen=True)
class Cell:
    """One discovery, with all that determines its result; `tau` is acdc's, `edges` that of the other methods."""

    model: str
    relation: Relation = field(repr=False)
    template: int | str
    method: str
    ablation: str
    tau: float | None
    edges: int | None
    metric: str
    n: int
    seed: int
    dtype: str

    @property
    def key(self) -> dict[str, Any]:
        """What it is, ready for JSON: the relation by name and digest."""
        known = {one.name: getattr(self, one.name) for one in fields(self)}
        return known | {"relation": self.relation.name, "relation_digest": self.relation.digest}

    @property
    def digest(self) -> str:
        """The first 24 hexadecimal digits of the SHA-256 of `key`."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: numbers and a circuit, or an error."""

    worker: str
    seconds: float | None
    model_digest: str | None = None
    numbers: Mapping[str, float] | None = None
    circuit: Circuit | None = None
    error: str | None = None


class _Worker:
    """What a worker process keeps between cells: its model, and the task that it asked last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[tuple[str, str, str], Model] = {}
        self._tasks: dict[tuple[str, ...], Task] = {}

    def model(self, cell: Cell, device: str) -> Model:
        """The cell's model, loaded unless it is the one at hand."""
        key = cell.model, device, cell.dtype
        with self._lock:
            if key not in self._models:
                self.forget()
                self._models[key] = load_model(cell.model, device=device, dtype=cell.dtype)
            return self._models[key]

    def task(self, model: Model, cell: Cell) -> Task:
        """The cell's task, made unless it is the one at hand."""
        key = model.digest, cell.relation.digest, repr((cell.template, cell.n, cell.seed, cell.dtype))
        with self._lock:
            if key not in self._tasks:
                made = make_task(model, cell.relation, n=cell.n, seed=cell.seed, template=cell.template)
                self._tasks = {key: made}
            return self._tasks[key]

    def forget(self) -> None:
        """Free the model and the task."""
        self._models.clear()
        self._tasks.clear()


#: This process as a worker.
WORKER = _Worker()


def run_cell(cell: Cell, device: str = "auto") -> Outcome:
    """Compute a cell where this is called: what an executor's workers run. Errors are returned, not raised."""
    started = time.perf_counter()
    worker = f"{socket.gethostname()}:{os.getpid()}"
    try:
        model = WORKER.model(cell, pinned_device(device))
        task = WORKER.task(model, cell)
        given = {"tau": cell.tau, "edges": cell.edges}
        circuit = discover(
            model, task, cell.method, metric=cell.metric, ablation=cell.ablation, progress=False, **given
        )
        numbers = _numbers(model, circuit, task)
    except Exception as error:  # a cell that fails must not stop the others
        return Outcome(worker, time.perf_counter() - started, error=error_words(error))
    return Outcome(worker, time.perf_counter() - started, model.digest, numbers, circuit)


def run_in_worker(cell: Cell, device: str, method: Method, kind: type[AblationKind]) -> Outcome:
    """`run_cell` in a process that does not outlive the one that started it; what executors are given.

    Method and kind of ablation are registered: they may be from outside the package, so that a new process lacks them.
    """
    leave_with_parent()
    register_method(method)
    register_ablation(kind)
    return run_cell(cell, device)


@functools.cache
def leave_with_parent() -> None:
    """In a worker process: end soon after the process that started it, even if that was killed.

    A pool's workers wait for work at a pipe that they themselves hold open, so that they would wait forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent, os.getppid()), daemon=True, name="kcwb-parent").start()


def _watch(parent: Any, number: int) -> None:
    while parent.is_alive() and os.getppid() == number:  # its end of a pipe closes; but forked siblings may hold that
        parent.join(1.0)
    os._exit(1)


def error_words(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def _numbers(model: Model, circuit: Circuit, task: Task) -> dict[str, float]:
    table = completeness(model, circuit, task, draws=0, progress=False).set_index(["run", "split"])
    numbers: dict[str, float] = {"n_edges": circuit.n_edges, "n_nodes": circuit.n_nodes}
    numbers |= {"share": circuit.n_edges / circuit.graph.n_edges, "facts": len(task.val)}
    for run, prefix in (("circuit", ""), ("full model", "full_")):
        for split, suffix in (("D_val", "val"), ("D_test", "test")):
            for key in ("hit", "nll"):
                if (run, split) in table.index:
                    numbers[f"{prefix}{key}_{suffix}"] = float(table[key].to_dict()[run, split])
    return {key: numbers[key] for key in NUMBERS if key in numbers}


_SLOTS: list[FileLock] = []


def pinned_device(device: str) -> str:
    """The device of this worker process: with `"auto"` and several GPUs, one of its own, in turn.

    The first process of a user on a machine takes number 0, the next 1, and so on; a number is free again when its
    process ends, however it does.
    """
    import torch

    if device != "auto" or not torch.cuda.is_available():
        return device
    return f"cuda:{_slot() % torch.cuda.device_count()}"


def _slot() -> int:
    """The number of this process among those of the machine that compute cells."""
    if not _SLOTS:
        folder = Path(tempfile.gettempdir()) / f"kcwb-workers-{getpass.getuser()}"
        folder.mkdir(exist_ok=True)
        for number in itertools.count():
            lock = FileLock(folder / f"{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _SLOTS.append(lock)  # held as long as the process lives
            break
    return int(Path(_SLOTS[0].lock_file).stem)
