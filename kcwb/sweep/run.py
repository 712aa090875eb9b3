"""One cell of a sweep, and the worker that computes it; see `kcwb.sweep.what`."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kcwb.circuits.ablation import AblationKind, register_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.methods import METHODS
from kcwb.discovery.registry import Method, register_method
from kcwb.evaluation.completeness import completeness
from kcwb.models.loading import Model
from kcwb.models.worker import WORKER, Latest, error_words, leave_with_parent, pinned_device
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, make_task

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
        method, given = METHODS[self.method], {}
        if method.scores:  # of what is not said, the default decides, which another version may have otherwise
            given = {"settings": {name: repr(value) for name, value in method.defaults.items() if name not in known}}
        return known | {"relation": self.relation.name, "relation_digest": self.relation.digest} | given

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


_TASK = Latest()


def run_cell(cell: Cell, device: str = "auto") -> Outcome:
    """Compute a cell where this is called: what an executor's workers run. Errors are returned, not raised."""
    started = time.perf_counter()
    worker = f"{socket.gethostname()}:{os.getpid()}"
    try:
        model = WORKER.model(cell.model, pinned_device(device), cell.dtype)
        asked = {"n": cell.n, "seed": cell.seed, "template": cell.template}
        of_model = cell.model, model.digest, str(model.device), cell.dtype, model.prepend_bos  # and its tokenizer
        key = *of_model, cell.relation.digest, repr(asked)
        task = _TASK.get(key, lambda: make_task(model, cell.relation, **asked))
        given = {"metric": cell.metric, "ablation": cell.ablation, "tau": cell.tau, "edges": cell.edges}
        circuit = discover(model, task, cell.method, progress=False, **given)
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


def _numbers(model: Model, circuit: Circuit, task: Task) -> dict[str, float]:
    table, shown = completeness(model, circuit, task, draws=0, progress=False), {"circuit": "", "full model": "full_"}
    numbers: dict[str, float] = {"n_edges": circuit.n_edges, "n_nodes": circuit.n_nodes}
    numbers |= {"share": circuit.n_edges / circuit.graph.n_edges, "facts": len(task.val)}
    for row in table[table["run"].isin(shown)].to_dict("records"):
        for key in ("hit", "nll"):
            numbers[f"{shown[row['run']]}{key}_{row['split'].removeprefix('D_')}"] = float(row[key])
    return {key: numbers[key] for key in NUMBERS if key in numbers}
