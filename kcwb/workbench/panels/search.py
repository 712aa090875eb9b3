"""What a discovery panel does on its worker: ask for facts, choose what is searched, time it, search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.discovery.discover import discover, predict
from kcwb.discovery.many import discover_many
from kcwb.discovery.methods import METHODS
from kcwb.discovery.selection import resize
from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, make_task
from kcwb.workbench.panels.runner import Latest
from kcwb.workbench.panels.widgets import duration

Settings = dict[str, Any]


class Search:
    """Discovery with settings from the screen; the last task and the last preselection are kept.

    Parameters
    ----------
    model
        The model.
    read
        Gives a relation by its name.
    enter
        Told what is done next.
    """

    def __init__(
        self, model: Model, read: Callable[[str], Relation], enter: Callable[[str, ProgressCallback], None]
    ) -> None:
        self._model, self._read, self._enter = model, read, enter
        self.task, self._searched = Latest[Task](), Latest[Circuit]()

    def ask(self, settings: Settings, progress: ProgressCallback) -> Task:
        """The task, made anew only when it differs from the last one."""
        self._enter(f"Asking {self._model.name} for the facts", progress)
        relation = self._read(settings["relation"])
        return self._make(relation, settings["n"], settings["seed"], settings["template"], progress)

    def discover(self, settings: Settings, progress: ProgressCallback) -> tuple[Circuit, Task]:
        """A circuit and what it was found on."""
        task, how = self._prepare(settings, progress)
        stage = "Discovering the circuit"
        if METHODS[how["method"]].seconds is not None:
            stage += f" (about {duration(self._seconds(task, how, progress))})"
        self._enter(stage, progress)
        return discover(self._model, task, progress=progress, **how), task

    def discover_many(self, settings: Settings, progress: ProgressCallback) -> tuple[Ensemble, Task]:
        """Many draws of a circuit, and what they were made on."""
        task, how = self._prepare(settings, progress)
        how |= {name: settings[name] for name in ("draws", "vary", "seed")}
        self._enter(f"Drawing {settings['draws']:,} circuits", progress)
        return discover_many(self._model, task, progress=progress, **how), task

    def predict(self, settings: Settings, progress: ProgressCallback) -> str:
        """How long ACDC takes, in words."""
        task, how = self._prepare(settings, progress)
        within = how.get("within")
        searched = self._model.graph.n_edges if within is None else within.n_edges
        took = duration(self._seconds(task, how, progress))
        return f"ACDC over {searched:,} edges and {len(task.val)} facts takes about {took} on this machine."

    def task_of(self, source: Mapping[str, Any], progress: ProgressCallback) -> Task:
        """The task that a provenance from a file tells of; KeyError if its relation is not at hand."""
        named = source["relation"]
        relation = self._read(named["name"])
        if relation.digest != named["digest"]:
            raise KeyError(named["name"])
        return self._make(relation, source["n"], source["seed"], source["template"], progress)

    def _make(self, relation: Relation, n: int, seed: int, template: Any, progress: ProgressCallback) -> Task:
        key = (self._model.digest, relation.digest, n, seed, template)
        return self.task.get(key, lambda: make_task(self._model, relation, n, seed, template, progress=progress))

    def _prepare(self, settings: Settings, progress: ProgressCallback) -> tuple[Task, Settings]:
        """The task, and what `discover` is told beside it."""
        task = self.ask(settings, progress)
        how = {key: settings[key] for key in ("method", "ablation", "metric")}
        takes = METHODS[settings["method"]].defaults
        if "edges" in takes:
            return task, {**how, "edges": settings["edges"]}
        if "tau" in takes and not 0 < settings["tau"] < float("inf"):
            raise SettingError(f"τ = {settings['tau']}: the loss increase to allow must be above 0 nats (try 0.01).")
        within = settings["within"]
        if within is not None and "within" in takes:
            within = self._preselect(task, within, how["metric"], how["ablation"], progress)
        own = {"tau": settings["tau"], "within": within}
        return task, how | {name: own[name] for name in own if name in takes}

    def _preselect(
        self, task: Task, edges: int, metric: str, ablation: str | None, progress: ProgressCallback
    ) -> Circuit:
        """The circuit that ACDC searches; scored anew only for another task, metric or ablation."""

        def search() -> Circuit:
            self._enter("Choosing by attribution which edges to search", progress)
            how: Settings = {"metric": metric, "ablation": ablation, "edges": edges}
            return discover(self._model, task, progress=progress, **how)

        return resize(self._searched.get((task, metric, ablation), search), edges=edges)

    def _seconds(self, task: Task, how: Settings, progress: ProgressCallback) -> float:
        """The predicted time of a run of ACDC."""
        self._enter("Timing a few steps of ACDC", progress)
        return predict(self._model, task, **how)
