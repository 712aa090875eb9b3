"""Panels: what the library does, behind widgets.

A panel holds no mathematics: each of its callbacks calls functions that a script can call. Long work runs on one worker
thread (`runner`), so the notebook stays usable; what went wrong is said in the panel; the last good result stays on
screen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.discovery.discover import discover, predict
from kcwb.discovery.methods import METHODS, check_method
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError, KcwbError, SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.models.loading import Model
from kcwb.outputs import CIRCUIT, check_output
from kcwb.progress import ProgressCallback
from kcwb.reading.roles import head_roles
from kcwb.tasks.prompts import Task, make_task
from kcwb.tasks.relations import Relation
from kcwb.workbench import tables
from kcwb.workbench.graph.page import graph_view
from kcwb.workbench.panels import results as findings
from kcwb.workbench.panels.base import PANEL_CLASS, ROW, Panel, button, dropdown, duration, room
from kcwb.workbench.panels.controls import Controls
from kcwb.workbench.panels.nodes import GRAPH_CLASS, NodePanel
from kcwb.workbench.panels.results import Finding

_NODE, _COMPARE = "Node", "Compare runs"
_TABS = ("Is it the model?", "Strongest edges", "Nodes", _NODE, "Facts", _COMPARE)


class DiscoveryPanel(Panel):
    """Discover a circuit with widgets: choose, run, look, cut anew, compare, keep.

    Parameters
    ----------
    model
        The model.
    relation
        What to start with: the name of a packaged relation, a file's path, or a Relation.
    method, ablation, metric
        As in `kcwb.discover`.
    edges
        How many edges an attribution method selects.
    tau
        The loss increase below which `acdc` cuts an edge.
    within
        How many edges `acdc` searches, chosen by `eap-ig` under the same ablation (`mean` where none is said, since
        attribution says little about `zero`); None searches all.
    n, seed, template
        As in `kcwb.make_task`; a template of your own is offered beside the relation's.
    draws
        Random circuits that a found one is compared with.
    height
        Of the graph, in pixels.

    Attributes
    ----------
    history
        Every run, in order.
    nodes
        The `NodePanel` for the circuit on screen.

    Raises
    ------
    DataError, SettingError
        If the relation cannot be read, or a setting is not known.

    Examples
    --------
    >>> panel = DiscoveryPanel(model, "country_capital")  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.circuit  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        relation: Relation | str | Path = "country_capital",
        *,
        method: str = "eap-ig",
        ablation: str | None = None,
        metric: str = "nll",
        edges: int = 300,
        tau: float = 0.01,
        within: int | None = None,
        n: int = 8,
        seed: int = 0,
        template: int | str = 0,
        draws: int = 10,
        height: int = 560,
    ) -> None:
        controls = Controls(
            model, relation, template=template, method=method, ablation=ablation, metric=metric,
            edges=edges, tau=tau, within=within, n=n, seed=seed,
        )  # fmt: skip
        super().__init__()
        self.controls = controls
        self.model = model
        self.history: list[Finding] = []
        self._shown: Finding | None = None
        self._draws, self._height = draws, height
        self._task: tuple[tuple, Task] | None = None  # the last one made, and of what
        self._searched: tuple[tuple, Circuit] | None = None  # the last preselection, and of what
        self._roles: tuple[Task, pd.DataFrame] | None = None  # the last ones asked for, and on what

        self._run_button = button("Run", "play", button_style="primary")
        self._run_button.layout.margin = "2px 2px 2px 90px"
        self._ask_button = button("Ask", "question", tooltip="Which facts does the model know?")
        self._predict_button = button("How long?", "clock-o", tooltip="Time a few steps of ACDC, without running it")
        self._runs = dropdown("Shown", [], None, wide=True)
        self._roles_button = button("Roles", "paint-brush", tooltip="Which heads move the answer? Colours the graph")
        self._summary, self._graph = W.HTML(), W.HTML(layout=W.Layout(width="100%"))
        self._graph.add_class(GRAPH_CLASS)
        self._tables = {name: W.HTML() for name in _TABS}
        self.nodes = NodePanel(model, graph=False)
        self._other = dropdown("Against", [], None, wide=True)
        self._both = W.HTML(layout=W.Layout(width="100%"))
        self._path = W.Text("circuit.json", description="File", layout=room(320))
        self._save_button = button("Save", "download")
        self._load_button = button("Load", "upload")
        self._lay_out()
        self._connect()

    # --- in a script ---

    @property
    def circuit(self) -> Circuit | None:
        """The circuit on screen."""
        return self._shown.circuit if self._shown else None

    @property
    def task(self) -> Task | None:
        """What it was found on."""
        return self._shown.task if self._shown else None

    @property
    def completeness(self) -> pd.DataFrame | None:
        """How it does alone; None while that is being computed."""
        return self._shown.completeness if self._shown else None

    @property
    def settings(self) -> dict[str, Any]:
        """What Run would run, as parameters of `make_task` and `discover`; `within` as a number of edges, or None."""
        return self.controls.settings

    def run(self) -> None:
        """Discover with the settings on screen, then test the circuit alone; returns at once, see `wait`."""
        self._message.value = ""
        settings = self.settings
        check_method(settings["method"], settings["metric"], settings["ablation"])

        def job(progress: ProgressCallback) -> Finding:
            task, how = self._prepare(settings, progress)
            stage = "Discovering the circuit"
            if not METHODS[how["method"]].scores:
                stage += f" (about {duration(self._seconds(task, how, progress))})"
            self._enter(stage, progress)
            return Finding("", discover(self.model, task, progress=progress, **how), task)

        self._start("discovery", job, self._add)

    def ask(self) -> None:
        """Show which facts the model knows, before a run; returns at once, see `wait`."""
        self._message.value = ""
        settings = self.settings

        def done(task: Task) -> None:
            with self._lock:
                self._tables["Facts"].value = tables.styled(findings.facts_table(task))
                self._result.layout.display = ""
                self._open("Facts")

        self._start("ask", lambda progress: self._ask(settings, progress), done)

    def predict(self) -> None:
        """Say how long ACDC would take with the settings on screen; returns at once, see `wait`."""
        self._message.value = ""
        settings = self.settings
        if METHODS[settings["method"]].scores:
            raise SettingError(
                "Only ACDC takes long enough to be timed first; the others show what is left as they run."
            )

        def job(progress: ProgressCallback) -> str:
            task, how = self._prepare(settings, progress)
            searched = self.model.graph.n_edges if how["within"] is None else how["within"].n_edges
            took = duration(self._seconds(task, how, progress))
            return f"ACDC over {searched:,} edges and {len(task.val)} facts takes about {took} on this machine."

        self._start("prediction", job, lambda words: self._say("kc-note", words))

    def find_roles(self) -> None:
        """Name all heads' roles on the task on screen, and colour the graph by them; returns at once, see `wait`."""
        self._message.value = ""
        task = self.task
        if task is None:
            raise SettingError("Roles are named on facts: press Run, or load a circuit whose relation is at hand.")

        def job(progress: ProgressCallback) -> pd.DataFrame:
            self._enter("Naming the heads' roles", progress)
            return head_roles(self.model, None, task, progress=progress)

        def done(table: pd.DataFrame) -> None:
            with self._lock:
                self._roles = task, table
                if self._shown is not None and self._shown.task is task:
                    self._show(self._shown)

        self._start("roles", job, done)

    @property
    def roles(self) -> pd.DataFrame | None:
        """The table of `kcwb.head_roles` for all heads, on the task on screen; None until `find_roles` is done."""
        return self._roles[1] if self._roles is not None and self._roles[0] is self.task else None

    def show(self, number: int) -> None:
        """Show a run of the history, counted from 0."""
        self._show(self.history[number])

    def resize(self, edges: int) -> None:
        """Cut the circuit on screen to another size, from the scores that it has, and test it again."""
        finding = self._shown
        if finding is None:
            return
        if self._runner.job == "test":
            self._runner.cancel()  # of the size that is left
        finding.circuit = resize(finding.circuit, edges=edges)
        finding.completeness = None
        finding.label = findings.label(finding.circuit, self.history.index(finding))
        self._show(finding)
        if self._runner.job in (None, "test"):
            self._test(finding)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the circuit on screen to a file; one that is there is overwritten if it is a circuit, or with `force`.

        Raises
        ------
        SettingError
            If there is no circuit yet, or the file cannot or must not be written.
        """
        if self._shown is None:
            raise SettingError("There is no circuit to save yet: press Run.")
        target = _file(path)
        check_output(target, CIRCUIT, what="The circuit", force=force)
        self._shown.circuit.save(target, force=force)
        self._say("kc-note", f"Saved to {target.resolve()}")

    def load(self, path: str | Path) -> None:
        """Read a circuit from a file, add it to the history and test it; returns at once, see `wait`."""
        self._message.value = ""
        source = _file(path)

        def job(progress: ProgressCallback) -> Finding:
            self._enter("Reading the circuit", progress)
            circuit = Circuit.load(source)
            check_same_model(self.model, circuit)
            return Finding("", circuit, self._task_of(circuit, progress))

        self._start("load", job, self._add)

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is running, here and in `nodes`; see `Panel.wait`."""
        super().wait(timeout)
        self.nodes.wait(timeout)
        self._refresh()

    def _leave(self) -> None:
        self.nodes.close()

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        finding = self._shown
        if finding is None:
            settings = {name: "all" if value is None else value for name, value in self.settings.items()}
            settings["ablation"] = self.settings["ablation"] or "usual for the method"
            return tables.styled(tables.heading("Settings"), tables.pairs(settings), self._message.value)
        return tables.styled(
            self._message.value,
            tables.heading("Settings"),
            tables.pairs(findings.settings_of(finding.circuit)),
            findings.summary(finding),
            self._graph.value,
            tables.heading("Is it the model?"),
            findings.completeness_table(finding),
            tables.heading("Strongest edges"),
            tables.table(finding.circuit.edges.head(10), findings.SCORE),
            self.nodes.to_html() if self.nodes.nodes else "",
        )

    # --- making ---

    def _connect(self) -> None:
        """What happens on which event."""

        def on(widget: W.Widget, work: Any, trait: str = "value") -> None:
            widget.observe(self._guarded(work), trait)

        on(self.controls.relation, lambda _: self.controls.offer_templates())
        on(self.controls.method, lambda _: self._offer_size())
        on(self.controls.edges, lambda _: self._recut())
        on(self._runs, lambda change: self.show(change["new"]))
        on(self._other, lambda _: self._draw_comparison())
        on(self._tabs, lambda _: self._draw_comparison(), "selected_index")
        on(self.nodes.clicks.field, self._on_click)
        self._run_button.on_click(self._guarded(lambda _: self.run()))
        self._ask_button.on_click(self._guarded(lambda _: self.ask()))
        self._roles_button.on_click(self._guarded(lambda _: self.find_roles()))
        self._predict_button.on_click(self._guarded(lambda _: self.predict()))
        self._save_button.on_click(self._guarded(lambda _: self.save(self._path.value)))
        self._load_button.on_click(self._guarded(lambda _: self.load(self._path.value)))

    def _lay_out(self) -> None:
        graph = self.model.graph
        size = f"{graph.n_layers} layers of {graph.n_heads} heads, {graph.n_edges:,} edges"
        about = W.HTML(tables.styled(tables.muted(f"{self.model.name}: {size}")))
        against = W.VBox([W.HBox([self._other], layout=ROW), self._tables[_COMPARE], self._both])
        boxes = {_NODE: self.nodes._root, _COMPARE: against}
        self._tabs = W.Tab([boxes.get(name, self._tables[name]) for name in _TABS], titles=_TABS, selected_index=0)
        self._result = W.VBox(
            [
                W.HBox([self._runs, self._roles_button], layout=ROW),
                self._summary,
                self._graph,
                self.nodes.clicks.widget,
                self._tabs,
            ],
            layout=W.Layout(display="none"),
        )
        for name in _TABS:
            self._tables[name].value = tables.styled(tables.muted("Press Run."))
        buttons = W.HBox([self._run_button, self._ask_button, self._predict_button, *self._progress], layout=ROW)
        self._offer_size()
        files = W.HBox([self._path, self._save_button, self._load_button], layout=ROW)
        self._root.add_class(PANEL_CLASS)
        self._assemble(about, self.controls.widget, buttons, self._message, self._result, files)

    # --- events ---

    def _offer_size(self) -> None:
        self.controls.offer_size()
        self._predict_button.layout.display = "none" if self.controls.scores else ""

    def _recut(self) -> None:
        """Follow the size slider, if the circuit on screen can."""
        if self._shown and findings.resizable(self._shown.circuit):
            self._message.value = ""
            self.resize(self.controls.size)

    def _on_click(self, change: Any) -> None:
        """A node was clicked, which the node panel shows: bring it to the front."""
        if self.nodes.clicks.names(change["new"], self.model):
            self._open(_NODE)

    def _open(self, name: str) -> None:
        self._tabs.selected_index = _TABS.index(name)

    # --- work; these run on the worker ---

    def _prepare(self, settings: dict[str, Any], progress: ProgressCallback) -> tuple[Task, dict[str, Any]]:
        """The task, and what `discover` is told beside it."""
        task = self._ask(settings, progress)
        how = {key: settings[key] for key in ("method", "ablation", "metric")}
        if METHODS[settings["method"]].scores:
            return task, {**how, "edges": settings["edges"]}
        how |= {"tau": settings["tau"], "within": None}
        if not 0 < how["tau"] < float("inf"):
            raise SettingError(f"τ = {how['tau']}: the loss increase to allow must be above 0 nats (try 0.01).")
        if settings["within"] is not None:
            how["within"] = self._preselect(task, settings["within"], how["metric"], how["ablation"], progress)
        return task, how

    def _ask(self, settings: dict[str, Any], progress: ProgressCallback) -> Task:
        """The task, made anew only when it differs from the last one."""
        self._enter(f"Asking {self.model.name} for the facts", progress)
        return self._make_task(
            self.controls.read(settings["relation"]), settings["n"], settings["seed"], settings["template"], progress
        )

    def _make_task(
        self, relation: Relation, n: int, seed: int, template: int | str, progress: ProgressCallback
    ) -> Task:
        key = (self.model.digest, relation.digest, n, seed, template)
        if self._task is None or self._task[0] != key:
            self._task = key, make_task(self.model, relation, n, seed, template, progress=progress)
        return self._task[1]

    def _preselect(
        self, task: Task, edges: int, metric: str, ablation: str | None, progress: ProgressCallback
    ) -> Circuit:
        """The circuit that ACDC searches; scored anew only for another task, metric or ablation."""
        key = (task, metric, ablation)
        if self._searched is None or self._searched[0] != key:
            self._enter("Choosing by attribution which edges to search", progress)
            found = discover(
                self.model, task, "eap-ig", metric=metric, ablation=ablation, edges=edges, progress=progress
            )
            self._searched = key, found
        return resize(self._searched[1], edges=edges)

    def _seconds(self, task: Task, how: dict[str, Any], progress: ProgressCallback) -> float:
        """The predicted time of a run of ACDC."""
        self._enter("Timing a few steps of ACDC", progress)
        return predict(self.model, task, **{key: how[key] for key in ("metric", "ablation", "within")})

    def _task_of(self, circuit: Circuit, progress: ProgressCallback) -> Task | None:
        """The task that a loaded circuit was found on; None, with a note, if its relation is not at hand."""
        source = circuit.provenance
        try:
            named = source["relation"]
            relation = self.controls.read(named["name"])
            if relation.digest != named["digest"]:
                raise KeyError(named["name"])
            return self._make_task(relation, source["n"], source["seed"], source["template"], progress)
        except (KeyError, TypeError, KcwbError):
            self._say("kc-note", "The relation of this circuit is not at hand in the same words; it is shown untested.")
            return None

    def _add(self, finding: Finding) -> None:
        with self._lock:
            size = self.controls.size
            asked = findings.parameter(finding.circuit, "edges") or size
            moved = self._runner.job == "discovery" and asked != size  # the slider, meanwhile
            if moved and findings.resizable(finding.circuit):
                finding.circuit = resize(finding.circuit, edges=size)
            finding.label = findings.label(finding.circuit, len(self.history))
            self.history.append(finding)
            before = self._shown
            try:
                self._show(finding)
            except Exception as error:  # of a file that holds what no run writes
                self.history.remove(finding)
                self._shown = before
                if before is not None:
                    self._show(before)
                raise CircuitError(
                    "This circuit cannot be shown: its provenance holds something that no discovery writes, as after "
                    "an edit by hand. Its edges can still be read: kcwb.Circuit.load(path).edges."
                ) from error
            self._test(finding)

    def _test(self, finding: Finding) -> None:
        """Compute the completeness of a circuit."""
        task, circuit = finding.task, finding.circuit
        if task is None:
            return

        def job(progress: ProgressCallback) -> pd.DataFrame:
            self._enter("Running the circuit alone", progress)
            return completeness(self.model, circuit, task, draws=self._draws, progress=progress)

        def done(table: pd.DataFrame) -> None:
            with self._lock:
                if finding.circuit is circuit:
                    finding.completeness = table
                if finding is self._shown:
                    self._draw_completeness(finding)

        self._start("test", job, done)

    # --- drawing ---

    def _show(self, finding: Finding) -> None:
        """Draw a finding everywhere but in the controls."""
        circuit = finding.circuit
        roles = self._roles[1] if self._roles is not None and self._roles[0] is finding.task else None
        graph = graph_view(circuit, roles=roles, height=self._height, title=findings.title(circuit))._repr_html_()
        drawn = {"Strongest edges": findings.edge_table(circuit), "Nodes": findings.node_table(circuit)}
        drawn["Facts"] = findings.facts_table(finding.task)
        with self._silently():
            self._shown = finding
            self._graph.value = graph
            self._draw_completeness(finding)
            for name, table in drawn.items():
                self._tables[name].value = tables.styled(table)
            self._runs.options = [(one.label, i) for i, one in enumerate(self.history)]
            self._runs.value = self.history.index(finding)
            others = [(one.label, i) for i, one in enumerate(self.history) if one is not finding]
            kept = self._other.value if self._other.value in [i for _, i in others] else None
            self._other.options = others
            self._other.value = kept if kept is not None else others[-1][1] if others else None
            self._draw_comparison()
            asked = findings.parameter(circuit, "edges")
            if asked and findings.resizable(circuit) and asked != self.controls.size:
                self.controls.edges.value = asked
            self._result.layout.display = ""
            self.nodes.show(circuit, finding.task, roles)

    def _draw_completeness(self, finding: Finding) -> None:
        self._summary.value = tables.styled(findings.summary(finding))
        self._tables["Is it the model?"].value = tables.styled(findings.completeness_table(finding))

    def _draw_comparison(self) -> None:
        """Two runs side by side, once somebody looks."""
        if self._tabs.selected_index != _TABS.index(_COMPARE):
            return
        other, shown = self._other.value, self._shown
        if other is None or shown is None:
            words = "Run once more, with other settings, to compare two circuits."
            self._tables[_COMPARE].value, self._both.value = tables.styled(tables.muted(words)), ""
            return
        numbers, graph = findings.comparison(shown, self.history[other], self._height)
        self._tables[_COMPARE].value, self._both.value = tables.styled(numbers), graph


def _file(path: str | Path) -> Path:
    if not str(path).strip():
        raise SettingError("Give the file a name, for example circuit.json.")
    return Path(os.path.expanduser(path))
