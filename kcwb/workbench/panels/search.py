"""What the panels that search have in common: what they are told, what they do on their worker, and a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets as W

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.discovery.discover import discover, predict
from kcwb.discovery.many import discover_many
from kcwb.discovery.methods import METHODS, check_method
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError, KcwbError, SettingError
from kcwb.models.loading import Model
from kcwb.outputs import Kind, check_output
from kcwb.progress import ProgressCallback
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, make_task
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.controls import Controls
from kcwb.workbench.panels.picker import Picker
from kcwb.workbench.panels.runner import Job, Latest
from kcwb.workbench.panels.widgets import button, duration, room, the_file

Settings = dict[str, Any]


class Search:
    """Discovery with settings from the screen; the last task and the last preselection are kept.

    `read` gives a relation by its name, `enter` is told what is done next.
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

    def task_of(self, source: Mapping[str, Any], progress: ProgressCallback) -> Task | None:
        """The task that a provenance from a file tells of; None if its relation is not at hand in the same words."""
        try:
            relation = self._read(source["relation"]["name"])
            if relation.digest != source["relation"]["digest"]:
                return None
            return self._make(relation, source["n"], source["seed"], source["template"], progress)
        except (KeyError, TypeError, KcwbError):
            return None

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
        self._enter("Timing a few steps of ACDC", progress)
        return predict(self._model, task, **how)


class SearchPanel(Panel):
    """A panel that searches on facts, and keeps what is on screen in a file; parameters as in `Picker`, `Controls`."""

    noun: ClassVar[str]
    kind: ClassVar[Kind]  # of the file

    def __init__(self, model: Model, relation: Relation | str | Path, template: int | str, **how: Any) -> None:
        super().__init__(model, button("Run", "play", button_style="primary"))
        self._run_button.layout.margin = "2px 2px 2px 90px"
        self.picker = Picker(self, relation, template=template)
        self.controls = Controls(model, **how)
        self._search = Search(model, self.picker.read, self._enter)
        self._path = W.Text(f"{self.noun}.json", description="File", layout=room(320))
        self._save_button = self._button("Save", "download", lambda: self.save(self._path.value))
        self._load_button = self._button("Load", "upload", lambda: self.load(self._path.value))
        self._asked: list[list[W.Widget]] = [[self.picker.relation, self.picker.template], *self.controls.rows]
        self._file = [self._path, self._save_button, self._load_button]

    @property
    def settings(self) -> dict[str, Any]:
        """What Run would run, as parameters of `make_task` and `discover`; `within` as a number of edges, or None."""
        named = {name: getattr(self.picker, name).value for name in ("relation", "template")}
        return {**named, **self.controls.settings}

    def _told_settings(self) -> dict[str, Any]:
        told = {name: "all" if value is None else value for name, value in self.settings.items()}
        return told | {"ablation": self.settings["ablation"] or "usual for the method"}

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write what is on screen to a file; one that is there is overwritten if it is of this kind, or with `force`.

        Raises
        ------
        SettingError
            If there is nothing yet, or the file cannot or must not be written.
        """
        kept = self._kept()
        if kept is None:
            raise SettingError(f"There is no {self.noun} to save yet: press Run.")
        target = the_file(path, f"{self.noun}.json")
        check_output(target, self.kind, what=f"The {self.noun}", force=force)
        kept.save(target, force=force)
        self._say("kc-note", f"Saved to {target.resolve()}")

    def load(self, path: str | Path) -> None:
        """Read from a file what `save` writes, and show it; returns at once, see `wait`."""
        source = the_file(path, f"{self.noun}.json")
        self._begin("load", lambda step: self._read(source, step), self._show_result, f"Reading the {self.noun}")

    def cancel(self) -> None:
        """Stop what is running at its next report; what is on screen stays."""
        stopped = self._runner.job
        super().cancel()
        if stopped == "run" and self._goes_on():
            self._say("kc-note", "Stopped. What was finished is kept: Run with these settings goes on from there.")

    def _job(self) -> Job:
        settings = self.settings
        check_method(settings["method"], settings["metric"], settings["ablation"])
        return lambda progress: self._find(settings, progress)

    def _unshowable(self) -> CircuitError:
        """Of a file that holds what no run writes."""
        return CircuitError(
            f"This {self.noun} cannot be shown: its provenance holds something that no discovery writes, as after an "
            f"edit by hand. Its edges can still be read: kcwb.{self.noun.capitalize()}.load(path).edges."
        )

    def _goes_on(self) -> bool:
        """Whether a run that was stopped is gone on with by the next one."""
        return not self.controls.sized

    def _kept(self) -> Circuit | Ensemble | None:
        """What is saved."""
        raise NotImplementedError

    def _read(self, source: Path, progress: ProgressCallback) -> Any:
        """What is shown of a file."""
        raise NotImplementedError

    def _find(self, settings: Settings, progress: ProgressCallback) -> Any:
        """Search."""
        raise NotImplementedError
