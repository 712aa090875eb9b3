"""Discover a circuit with widgets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.circuits.ablation import AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.discovery.methods import DEFAULT, METHODS
from kcwb.discovery.selection import resize
from kcwb.errors import SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.models.loading import Model
from kcwb.outputs import CIRCUIT
from kcwb.progress import ProgressCallback
from kcwb.reading.roles import head_roles
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task
from kcwb.workbench import tables
from kcwb.workbench.panels import results
from kcwb.workbench.panels.bench import Bench
from kcwb.workbench.panels.comparison import Comparison
from kcwb.workbench.panels.nodes import NodePanel
from kcwb.workbench.panels.playing import Playing
from kcwb.workbench.panels.ranked import Ranked
from kcwb.workbench.panels.results import Found
from kcwb.workbench.panels.search import SearchPanel, Settings
from kcwb.workbench.panels.sizes import Sizes
from kcwb.workbench.panels.widgets import dropdown, hidden_graph, offer

_NODE, _COMPARE, _REFEREE = "Node", "Compare runs", "Referee"
_AFTER = ("test", "play")  # jobs on the circuit that is on screen


class DiscoveryPanel(SearchPanel):
    """Discover a circuit with widgets: choose, run, look, cut anew, compare, keep.

    Parameters
    ----------
    model, relation
        As in `Panel` and `Picker`.
    method, ablation, metric
        As in `kcwb.discover`.
    edges
        How many edges an attribution method selects.
    tau
        The loss increase below which `acdc` cuts an edge.
    within
        How many edges `acdc` searches, chosen by the default method under the same ablation (`mean` where none is
        said, since attribution says little about `zero`); None searches all.
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
    bench
        The referee: `bench.judge()`, and then `bench.judgement`.
    sizes
        Hit@10 of circuits of other sizes: `sizes.measure()`.

    Examples
    --------
    >>> panel = DiscoveryPanel(model, "country_capital")  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.circuit  # doctest: +SKIP
    """

    noun, kind = "circuit", CIRCUIT
    pages = ("Is it the model?", "Strongest edges", "Nodes", _NODE, "Facts", _COMPARE, _REFEREE)

    def __init__(
        self,
        model: Model,
        relation: Relation | str | Path = "country_capital",
        *,
        method: str = DEFAULT,
        ablation: str | AblationKind | None = None,
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
        how = {"method": method, "ablation": ablation, "metric": metric, "edges": edges, "tau": tau, "within": within}
        super().__init__(model, relation, template, **how, n=n, seed=seed)
        self.history: list[Found] = []
        self._shown: Found | None = None
        self._draws = draws
        self._untestable: Circuit | None = None  # whose test failed
        self._roles: tuple[Task, pd.DataFrame] | None = None  # the last ones asked for, and on what
        self._ask_button = self._button("Ask", "question", self.ask, tooltip="Which facts does the model know?")
        self.sizes = Sizes(self, lambda: self._shown)
        self._predict_button = self._button("How long?", "clock-o", self.predict, tooltip="Time a few steps of ACDC")
        self._runs = dropdown("Shown", [], None, least=400)
        self._roles_button = self._button("Roles", "paint-brush", self.find_roles, tooltip="Which heads move answers?")
        self._graph = hidden_graph(height)
        self.nodes = NodePanel(model, graph=False)
        self._comparison = Comparison(height)
        self.bench = Bench(self, lambda: self._shown)
        self._ranked = {name: Ranked() for name in self.pages[1:3]}
        for table in self._ranked.values():
            self._on(table, lambda change: self._playing.choose(change["new"], self.nodes.select), "chosen")
        self._on(self.controls.method, lambda _: self._offer_size())
        self._on(self.controls.edges, lambda _: self._recut())
        self._on(self._runs, lambda change: self.show(change["new"]))
        self._on(self._comparison.other, lambda _: self._compare())
        self._on(self._tabs, lambda _: self._compare(), "selected_index")
        self._on(self._graph, self._on_click, "selected")
        self._playing = Playing(self, self._graph, lambda: (self.circuit, self.task))
        size = f"{model.graph.n_layers} layers of {model.graph.n_heads} heads, {model.graph.n_edges:,} edges"
        others = {_NODE: self.nodes._root, _COMPARE: self._comparison.widget, _REFEREE: self.bench.widget}
        self._tabs.children = list({**self._pages, **self._ranked, **others}.values())
        self._fill(dict.fromkeys(self.pages, tables.muted("Press Run.")))
        self._offer_size()
        self._lay_out(
            W.HTML(tables.styled(tables.muted(f"{model.name}: {size}"))),
            *self._asked,
            self.sizes.drawn,
            buttons=(self._ask_button, self._predict_button, self.sizes.button),
            above=([self._runs, self._roles_button],),
            below=(self._graph,),
            last=(self._file,),
        )

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

    def ask(self) -> None:
        """Show which facts the model knows, before a run; returns at once, see `wait`."""

        def done(task: Task) -> None:
            self._fill({"Facts": results.facts_table(task)})
            self._result.layout.display = ""
            self._open("Facts")

        self._begin("ask", partial(self._search.ask, self.settings), done)

    def predict(self) -> None:
        """Say how long ACDC would take with the settings on screen; returns at once, see `wait`."""
        if METHODS[self.settings["method"]].seconds is None:
            raise SettingError("Only ACDC takes long enough to be timed first; the others say what is left.")
        self._begin("prediction", partial(self._search.predict, self.settings), partial(self._say, "kc-note"))

    def find_roles(self) -> None:
        """Name all heads' roles on the task on screen, and colour the graph by them; returns at once, see `wait`."""
        task = self.task
        if task is None:
            raise SettingError("Roles are named on facts: press Run, or load a circuit whose relation is at hand.")

        def job(progress: ProgressCallback) -> pd.DataFrame:
            return head_roles(self.model, None, task, progress=progress)

        def done(table: pd.DataFrame) -> None:
            self._roles = task, table
            if self._shown is not None and self._shown.task is task:
                self._draw(self._shown)

        self._begin("roles", job, done, "Naming the heads' roles")

    @property
    def roles(self) -> pd.DataFrame | None:
        """The table of `kcwb.head_roles` for all heads, on the task on screen; None until `find_roles` is done."""
        return self._roles[1] if self._roles is not None and self._roles[0] is self.task else None

    def show(self, number: int) -> None:
        """Show a run of the history, counted from 0."""
        self._draw(self.history[number])

    def resize(self, edges: int) -> None:
        """Cut the circuit on screen to another size, from the scores that it has, and test it again."""
        found = self._shown
        if found is None:
            return
        circuit = resize(found.circuit, edges=edges)
        if self._runner.job in _AFTER:
            self._runner.cancel()  # of the size that is left
        found.circuit, found.completeness, found.judgement = circuit, None, None
        found.label = results.label(found.circuit, self.history.index(found))
        self._draw(found)
        if self._runner.job in (None, *_AFTER):
            self._test(found)

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is running, here and in `nodes`; see `Panel.wait`."""
        super().wait(timeout)
        self.nodes.wait(timeout)
        self._refresh()

    def _leave(self) -> None:
        self.nodes.close()

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        if self._shown is None:
            return self._settings_html()
        nodes = self.nodes.to_html() if self.nodes.nodes else ""
        drawn = results.plain(self._shown, self.sizes.to_html() + self._graph._repr_html_())
        return tables.styled(self._message.value, drawn, self.bench.to_html(), nodes)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return super()._repr_mimebundle_(include, exclude) | results.headline(self._shown)

    # --- events ---

    def _offer_size(self) -> None:
        self.controls.offer_size()
        self._predict_button.layout.display = "none" if self.controls.sized else ""
        self.sizes.button.layout.display = "" if self.controls.sized else "none"

    def _recut(self) -> None:
        """Follow the size slider, if the circuit on screen can."""
        if self._shown and results.resizable(self._shown.circuit):
            self._message.value = ""
            self.resize(self.controls.size)

    def _on_click(self, change: Any) -> None:
        """Nodes were clicked: look at them in the node panel, and bring it to the front."""
        if change["new"]:
            self.nodes.select(*change["new"])
            self._open(_NODE)

    def _open(self, name: str) -> None:
        self._tabs.selected_index = self.pages.index(name)

    # --- work; on the worker ---

    def _kept(self) -> Circuit | None:
        return self.circuit

    def _find(self, settings: Settings, progress: ProgressCallback) -> Found:
        return Found("", *self._search.discover(settings, progress))

    def _read(self, source: Path, progress: ProgressCallback) -> Found:
        circuit = Circuit.load(source)
        check_same_model(self.model, circuit)
        task = self._search.task_of(circuit.provenance, progress)
        if task is None:
            self._say("kc-note", "The relation of this circuit is not at hand in the same words; it is shown untested.")
        return Found("", circuit, task)

    def _show_state(self) -> None:
        super()._show_state()
        if self.state not in ("done", "failed") or (found := self._shown) is None:
            return
        if found.completeness is None and found.circuit is not self._untestable:
            self._test(found)  # which gave way to other work
        elif self.state == "done":
            self._playing.resume()

    def _test(self, found: Found) -> None:
        task, circuit = found.task, found.circuit
        if task is None:
            return

        def job(progress: ProgressCallback) -> pd.DataFrame:
            try:
                return completeness(self.model, circuit, task, draws=self._draws, progress=progress)
            except Exception:
                self._untestable = circuit
                raise

        def done(table: pd.DataFrame) -> None:
            if found.circuit is circuit:
                found.completeness = table
            if found is self._shown:
                self._draw_completeness(found)
                self._playing.resume("test")

        self._start("test", job, done, "Running the circuit alone")

    # --- drawing ---

    def _take(self, result: Found) -> dict[str, str]:
        size = self.controls.size
        asked = results.parameter(result.circuit, "edges") or size
        if self._runner.job == "run" and asked != size and results.resizable(result.circuit):  # the slider has moved
            result.circuit = resize(result.circuit, edges=size)
        result.label = results.label(result.circuit, len(self.history))
        self.history.append(result)
        before = self._shown
        try:
            self._draw(result)
        except Exception as error:
            self.history.remove(result)
            self._shown = before
            if before is not None:
                self._draw(before)
            raise self._unshowable() from error
        self._test(result)
        return {}

    def _draw(self, found: Found) -> None:
        """Draw a circuit everywhere but in the controls."""
        circuit = found.circuit
        roles = self._roles[1] if self._roles is not None and self._roles[0] is found.task else None
        ranked = results.rankings(circuit)
        with self._silently():
            self._graph.show(circuit, roles=roles, title=results.title(circuit), details=results.writes(roles))
            self._graph.layout.display = ""
            self._shown = found
            self._draw_completeness(found)
            self._fill({"Facts": results.facts_table(found.task)})
            for name, ranking in ranked.items():
                self._ranked[name].show(*ranking)
            offer(self._runs, [(one.label, i) for i, one in enumerate(self.history)], self.history.index(found))
            self._comparison.offer(self.history, found)
            self.bench.draw()
            self.sizes.draw()
            self._compare()
            asked = results.parameter(circuit, "edges")
            if asked and results.resizable(circuit) and asked != self.controls.size:
                self.controls.edges.value = asked
            self._result.layout.display = ""
            self.nodes.show(circuit, found.task, roles)

    def _draw_completeness(self, found: Found) -> None:
        self._summary.value = tables.styled(results.summary(found))
        self._fill({"Is it the model?": results.completeness_table(found)})

    def _compare(self) -> None:
        """Two runs side by side, once somebody looks."""
        if self._tabs.selected_index == self.pages.index(_COMPARE):
            self._comparison.draw(self.history, self._shown)
