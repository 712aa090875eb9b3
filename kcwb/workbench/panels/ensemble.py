"""How sure is each edge: draw a circuit many times, with widgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.circuits.ablation import AblationKind, ablation_kind
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.run import check_same_model
from kcwb.discovery.draws import SOURCES
from kcwb.discovery.methods import DEFAULT, METHODS
from kcwb.errors import DataError, SettingError, choose
from kcwb.evaluation.confidence import confidence_curve
from kcwb.models.loading import Model
from kcwb.outputs import ENSEMBLE
from kcwb.progress import ProgressCallback
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, check_same_weights
from kcwb.workbench import tables
from kcwb.workbench.panels import sureness
from kcwb.workbench.panels.results import title
from kcwb.workbench.panels.search import SearchPanel, Settings
from kcwb.workbench.panels.widgets import hidden_graph, room, wide

_MOST_OFFERED = 500  # edges, as one types
_TIPS = {
    "facts": "Other facts: a bootstrap resample",
    "template": "Other wordings of the relation",
    "setting": "Other settings of the method, as how many edges",
    "ablation": "What is left to chance in the ablation",
    "order": "Another order in which heads are visited",
}


class EnsemblePanel(SearchPanel):
    """Draw a circuit many times, and look at the edges by how sure they are.

    Parameters
    ----------
    model, relation
        As in `Panel` and `Picker`.
    method, ablation, metric, edges, tau, within, n, template
        As in `DiscoveryPanel`.
    draws, vary
        As in `kcwb.discover_many`; None varies all that can be.
    seed
        Of the facts, and of the draws.
    confidence
        At which the consensus is drawn.
    ensemble, task, curve
        One to start with, what it was made on (made from what the ensemble says where it is not given), and its curve.
    height
        Of the graph, in pixels.

    Attributes
    ----------
    ensemble, task
        What is on screen.
    circuit
        Its consensus at the confidence on screen.
    curve
        `kcwb.Ensemble.curve` of it; None until that is computed, which takes a minute or so: see `test`.
    chosen
        The edge (`sender->receiver`) or node that was clicked or chosen.

    Examples
    --------
    >>> panel = EnsemblePanel(model, "country_capital", draws=40)  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.show(0.9); panel.circuit  # doctest: +SKIP
    """

    noun, kind = "ensemble", ENSEMBLE
    pages = ("How sure?", "Confidence curve", "By layer", "Edges", "Nodes")

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
        n: int = 16,
        seed: int = 0,
        template: int | str = 0,
        draws: int = 100,
        vary: Sequence[str] | None = None,
        confidence: float = 0.5,
        ensemble: Ensemble | None = None,
        task: Task | None = None,
        curve: pd.DataFrame | None = None,
        height: int = 560,
    ) -> None:
        for name in vary or ():
            choose("The source of variation", name, SOURCES)
        if draws < 2 or not 0 < confidence <= 1:
            raise SettingError(
                f"draws={draws}, confidence={confidence}: ask for at least 2 draws, and a share above 0, at most 1."
            )
        if ensemble is not None:
            check_same_model(model, ensemble.consensus(1.0))
        if task is not None:
            check_same_weights(model, task)
        how = {"method": method, "ablation": ablation, "metric": metric, "edges": edges, "tau": tau, "within": within}
        super().__init__(model, relation, template, **how, n=n, seed=seed)
        self.ensemble: Ensemble | None = None
        self.task: Task | None = None
        self.circuit: Circuit | None = None
        self.curve: pd.DataFrame | None = None
        self.chosen: str | None = None
        self._draws = W.BoundedIntText(draws, min=2, max=100_000, description="Draws", layout=W.Layout(width="180px"))
        self._sources = {
            name: W.Checkbox(vary is None or name in vary, description=name, indent=False, tooltip=_TIPS[name],
                             layout=W.Layout(width="auto", margin="0 10px 0 0"))
            for name in SOURCES
        }  # fmt: skip
        testing = "Test the consensus at each confidence, on facts that no draw has seen"
        self._test_button = self._button("Test", "check", self.test, tooltip=testing)
        self._confidence = W.FloatSlider(
            confidence, min=0.01, max=1, step=0.01, description="Confidence", readout_format=".2f",
            continuous_update=False, layout=room(320),
        )  # fmt: skip
        words = {"description": "Edge", "placeholder": "click one in the graph, or type it"}
        self._edge = W.Combobox(ensure_option=False, continuous_update=False, layout=room(320), **words)
        self._graph, self._card = hidden_graph(height), wide()
        for trait in ("selected", "selected_edges"):
            self._on(self._graph, self._on_click, trait)
        self._on(self.controls.method, lambda _: self._offer())
        self._on(self.controls.ablation, lambda _: self._offer())
        self._on(self._confidence, lambda _: self._redraw())
        self._on(self._edge, lambda _: self._look())
        self._offer()
        varied = W.HBox(
            [W.Label("Vary", layout=W.Layout(width="84px", justify_content="flex-end")), *self._sources.values()],
            layout=W.Layout(flex_flow="row wrap", align_items="center", grid_gap="0 6px"),
        )
        self._lay_out(
            *self._asked,
            [self._draws, varied],
            buttons=(self._test_button,),
            above=([self._confidence, self._edge],),
            below=(self._graph, self._card),
            last=(self._file,),
        )
        if ensemble is not None:
            self._show_result((ensemble, task))
            if curve is not None:
                self.curve = curve
                self._fill({"Confidence curve": sureness.curve(curve)})

    # --- in a script ---

    @property
    def settings(self) -> dict[str, Any]:
        """What Run would run; `vary` as in `kcwb.discover_many`, and `within` as a number of edges, or None."""
        ticked = [name for name, box in self._sources.items() if box.value and not box.disabled]
        everything = all(box.value for box in self._sources.values() if not box.disabled)
        return {**super().settings, "draws": self._draws.value, "vary": None if everything else ticked}

    def show(self, confidence: float) -> None:
        """Draw the consensus at another confidence."""
        if self.ensemble is None:
            raise SettingError("There is no ensemble yet: press Run.")
        circuit, told = self._at(self.ensemble, confidence)
        with self._silently():
            self._show_graph(circuit, self.ensemble)
            self.circuit, self._summary.value = circuit, told
            self._confidence.value = confidence

    def select(self, name: str) -> None:
        """Look at an edge, `sender->receiver`, or at a node.

        Raises
        ------
        CircuitError
            If the model has none of that name.
        """
        if self.ensemble is None:
            raise SettingError("There is no ensemble yet: press Run.")
        graph = self.model.graph
        (graph.edge_index if "->" in name else graph.node)(name)
        drawn = tables.styled(sureness.card(self.ensemble, name))
        with self._silently():
            self.chosen, self._card.value, self._message.value = name, drawn, ""
            self._edge.value = name

    def test(self) -> None:
        """Compute the confidence curve; returns at once, see `wait`."""
        ensemble, task = self.ensemble, self.task
        if ensemble is None:
            raise SettingError("There is no ensemble yet: press Run.")

        def job(progress: ProgressCallback) -> tuple[Task | None, pd.DataFrame | str]:
            known = task or self._search.task_of(ensemble.provenance, progress)
            if known is None:
                return None, "The facts that this ensemble was made on are not at hand, so that it cannot be tested."
            self._enter("Testing the consensus at each confidence", progress)
            try:
                return known, confidence_curve(self.model, ensemble, known, progress=progress)
            except DataError as error:
                return known, str(error)

        def done(result: tuple[Task | None, pd.DataFrame | str]) -> None:
            known, found = result
            drawn = tables.muted(found) if isinstance(found, str) else sureness.curve(found)
            if self.ensemble is ensemble:
                self.task, self.curve = known, None if isinstance(found, str) else found
                self._fill({"Confidence curve": drawn})

        self._begin("test", job, done)

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        if self.ensemble is None or self.circuit is None:
            return self._settings_html()
        parts = [part for name in self.pages for part in (tables.heading(name), self._pages[name].value)]
        told = (self._summary.value, self._graph._repr_html_(), self._card.value, *parts)
        return tables.styled(self._message.value, sureness.plain(self.ensemble, self.circuit, *told))

    def _told_settings(self) -> dict[str, Any]:
        vary = self.settings["vary"]
        return super()._told_settings() | {"vary": "all that can be" if vary is None else ", ".join(vary)}

    # --- events ---

    def _offer(self) -> None:
        """The sizes and the sources of chance that the method and the ablation have."""
        self.controls.offer_size()
        method = METHODS[str(self.controls.method.value)]
        kind = ablation_kind(self.controls.ablation.value or method.ablation)
        chance = type(kind).drawn_again is not AblationKind.drawn_again or hasattr(kind, "seed")
        has = {"order": "order" in method.own, "ablation": chance, "setting": method.scores or bool(method.varied)}
        for name, box in self._sources.items():
            box.disabled = not has.get(name, True)

    def _redraw(self) -> None:
        if self.ensemble is not None:
            self.show(self._confidence.value)

    def _look(self) -> None:
        """Follow the field of edges; it is emptied to type another name."""
        if self._edge.value.strip():
            self.select(self._edge.value.strip())

    def _on_click(self, change: Any) -> None:
        if change["new"] and self.ensemble is not None:
            self.select(change["new"][0])

    # --- work; on the worker ---

    def _goes_on(self) -> bool:
        return True

    def _kept(self) -> Ensemble | None:
        return self.ensemble

    def _find(self, settings: Settings, progress: ProgressCallback) -> tuple[Ensemble, Task]:
        return self._search.discover_many(settings, progress)

    def _read(self, source: Path, progress: ProgressCallback) -> tuple[Ensemble, None]:
        ensemble = Ensemble.load(source)
        check_same_model(self.model, ensemble.consensus(1.0))
        return ensemble, None

    # --- drawing ---

    def _take(self, result: tuple[Ensemble, Task | None]) -> dict[str, str]:
        ensemble, task = result
        try:
            circuit, told = self._at(ensemble, self._confidence.value)
            drawn = sureness.pages(ensemble)
            sureness.plain(ensemble, circuit)
            with self._silently():
                self._show_graph(circuit, ensemble)
        except Exception as error:
            raise self._unshowable() from error
        with self._silently():
            self.ensemble, self.task, self.curve, self.chosen = ensemble, task, None, None
            self.circuit, self._summary.value = circuit, told
            named = ensemble.edges.head(_MOST_OFFERED)
            self._edge.options = [f"{a}->{b}" for a, b in zip(named["sender"], named["receiver"], strict=True)]
            self._edge.value = self._card.value = ""
        return drawn

    def _at(self, ensemble: Ensemble, confidence: float) -> tuple[Circuit, str]:
        """The consensus at a confidence, and the lines above its graph."""
        circuit = ensemble.consensus(confidence)
        return circuit, tables.styled(sureness.summary(ensemble, circuit, confidence))

    def _show_graph(self, circuit: Circuit, ensemble: Ensemble) -> None:
        self._graph.show(circuit, ensemble=ensemble, title=title(circuit))
        self._graph.layout.display = ""
