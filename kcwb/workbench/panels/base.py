"""What every panel has: a button and its job on a worker, messages, results in tabs, and a plain drawing.

A panel of one's own is a subclass in a file of its own:

    class AskPanel(Panel):
        pages = ("Facts",)

        def __init__(self, model, relation="country_capital"):
            super().__init__(model, button("Ask", "question"))
            self.picker = Picker(self, relation)
            self._lay_out([self.picker.relation, self.picker.template])

        @property
        def settings(self):
            return {"relation": self.picker.relation.value, "template": self.picker.wording}

        def _job(self):  # reads the controls, and gives what is then done on the worker
            relation, template = self.picker.chosen, self.picker.number
            return lambda progress: make_task(self.model, relation, template=template, progress=progress)

        def _take(self, task):  # keeps the result, and gives the HTML of each page
            self.task = task
            return {"Facts": tables.table(...)}

`kcwb.workbench.panels.registry` says how it gets a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as W

from kcwb.circuits.ensemble import Ensemble
from kcwb.workbench import tables
from kcwb.workbench.panels.life import Living
from kcwb.workbench.panels.runner import Job
from kcwb.workbench.panels.widgets import hidden_graph, rows, wide

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.models.loading import Model


class Panel(Living):
    """A job behind widgets; the head of this module shows what a subclass gives.

    Parameters
    ----------
    model
        The model.
    start
        The button that calls `run`.

    Raises
    ------
    DataError, SettingError
        By any panel, before it is made: if a relation cannot be read, or a setting cannot be meant.
    """

    pages: ClassVar[tuple[str, ...]] = ()
    """The titles of the tabs under which results are shown."""
    graphs: ClassVar[Mapping[str, int]] = {}
    """Those in which a graph stands above the rest, and its height in pixels."""

    def __init__(self, model: Model, start: W.Button) -> None:
        super().__init__(model)
        self._run_button = start
        self._press(start, self.run)
        self._summary = W.HTML()
        self._pages = {name: wide() for name in self.pages}
        self._graphs = {name: hidden_graph(height) for name, height in self.graphs.items()}
        tabs = [W.VBox([self._graphs[name], one]) if name in self._graphs else one for name, one in self._pages.items()]
        self._tabs = W.Tab(tabs, titles=self.pages)
        self._result = W.VBox(layout=W.Layout(display="none"))
        self._adopt()

    @property
    def settings(self) -> dict[str, Any]:
        """What `run` would do, by name."""
        raise NotImplementedError

    def run(self) -> None:
        """Do what the panel is for with the settings on screen; returns at once, see `wait`.

        What is on screen stays there until it is done.
        """
        self._begin(self._run_button.description.lower(), self._job(), self._show_result)

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        if self._result.layout.display == "none":
            return self._settings_html()
        drawn = {name: graph._repr_html_() for name, graph in self._graphs.items() if graph.layout.display != "none"}
        pages = [
            part for name in self.pages for part in (tables.heading(name), drawn.get(name, ""), self._pages[name].value)
        ]
        return tables.styled(self._message.value, self._summary.value, *pages)

    def _settings_html(self) -> str:
        return tables.styled(tables.heading("Settings"), tables.pairs(self._told_settings()), self._message.value)

    # --- what a subclass gives ---

    def _job(self) -> Job:
        """What `run` does, as a function of a progress callback; called when the controls are to be read."""
        raise NotImplementedError

    def _take(self, result: Any) -> Mapping[str, str]:
        """Keep a result in attributes, and give the HTML of pages; called on the worker."""
        raise NotImplementedError

    def _told_settings(self) -> dict[str, Any]:
        """The settings that the plain drawing names."""
        return self.settings

    # --- what it is given ---

    def _lay_out(
        self,
        *controls: list[W.Widget] | W.Widget,
        buttons: tuple[W.Widget, ...] = (),
        above: tuple[list[W.Widget] | W.Widget, ...] = (),
        below: tuple[list[W.Widget] | W.Widget, ...] = (),
        last: tuple[list[W.Widget], ...] = (),
    ) -> None:
        """The panel from top to bottom, when all of its widgets are made; widgets of a list stand side by side.

        Parameters
        ----------
        controls
            What is chosen before `run`.
        buttons
            Beside the one that runs.
        above, below
            Above and below the summary of the result; the tabs follow.
        last
            Below the result.
        """
        self._result.children = rows(*above, self._summary, *below, *([self._tabs] if self.pages else []))
        start = [self._run_button, *buttons, *self._progress]
        self._assemble(*rows(*controls, start, self._message, self._result, *last))

    def _show_result(self, result: Any) -> None:
        with self._lock:
            self._fill(self._take(result))
            self._result.layout.display = ""

    def _fill(self, pages: Mapping[str, str]) -> None:
        for name, drawn in pages.items():
            self._pages[name].value = tables.styled(drawn)

    def _draw_two(self, name: str, circuits: Mapping[str, Circuit | Ensemble] | None) -> None:
        """Draw two circuits, of ensembles the consensus, in the graph under a title; None for no graph."""
        graph = self._graphs[name]
        if circuits is not None:
            left, right = (one.consensus() if isinstance(one, Ensemble) else one for one in circuits.values())
            graph.compare(left, right, names=tuple(circuits))
        graph.layout.display = "none" if circuits is None else ""

    def _summarise(self, words: str) -> None:
        """What stands above the tabs."""
        self._summary.value = tables.styled(tables.summary(words))
