"""A graph that is played in a panel: its circuit is asked its facts after each step, its chosen node is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.errors import SettingError
from kcwb.evaluation.play import Play
from kcwb.progress import ProgressCallback
from kcwb.tasks.task import Task
from kcwb.workbench.graph.reading import read_node
from kcwb.workbench.graph.steps import lead
from kcwb.workbench.graph.widget import CircuitGraph
from kcwb.workbench.panels.life import Living
from kcwb.workbench.panels.runner import Latest

_PLAY, _READ = "play", "read"


class Playing:
    """Answers what is cut and forced in a graph, and reads the node that is selected in it.

    Both are jobs of the panel's worker, which wait for its other jobs: `resume` after these. Playing goes first: it
    stops a reading, which then begins again. `of` gives the circuit that is drawn and what it is asked.
    """

    def __init__(
        self, panel: Living, graph: CircuitGraph, of: Callable[[], tuple[Circuit | None, Task | None]]
    ) -> None:
        self._panel, self._graph, self._of = panel, graph, of
        self._play, self._cuts = Latest[Play](), Latest[Ablation]()
        self._full = Latest[list[dict[str, Any]]]()  # what is read of a node in the full model
        self._played: object = None  # what was answered last, and of what
        self._read: object = None  # the same of what was read
        for trait in ("cut", "forced"):
            panel._on(graph, lambda _: self.play(), trait)
        panel._on(graph, lambda _: self.ask(), "question")
        panel._on(graph, lambda _: self.read(), "selected")
        graph.asks = True

    def ask(self) -> None:
        """Ask a prompt of one's own, too, now and after each step."""
        if self._graph.question and None in self._of():
            raise SettingError(
                "The facts that this circuit was found on are not at hand, so that nothing can be asked."
            )
        self.play()

    def resume(self, after: str | None = None) -> None:
        """At the end of another job, by its name: answer what was cut meanwhile, and read what was chosen."""
        graph, now = self._graph, self._now()
        if now != self._played if graph.answers else any(now[2:]):
            self.play(after)
        else:
            self.read(after)

    def choose(self, name: str, look: Callable[[str], None]) -> None:
        """Select the node or edge of a table's row in the graph, without its followers; look at a node, and read it."""
        if not name:
            return
        with self._panel._silently():
            self._graph.selected, self._graph.selected_edges = ([], [name]) if "->" in name else ([name], [])
        if "->" not in name:
            look(name)
            self.read()

    def play(self, after: str | None = None) -> None:
        """Ask the circuit its facts as it is in the graph now, and then read on; after other work, not instead."""
        (circuit, task), graph, panel = self._of(), self._graph, self._panel
        if circuit is None or task is None or panel._runner.job not in (None, _PLAY, _READ, after):
            return
        asked = _, _, cut, forced, question = self._now()

        def job(progress: ProgressCallback) -> dict[str, Any]:
            graph.busy = True
            try:
                play = self._play.get((circuit, task), lambda: Play(panel.model, circuit, task))
                return lead(play, cut, forced, question)
            finally:
                graph.busy = False

        def done(answers: dict[str, Any]) -> None:
            if self._of() == (circuit, task):
                graph.answers, self._played = answers, asked
                self.read(_PLAY)

        panel._start(_PLAY, job, done, "Asking the circuit as it is now")

    def _now(self) -> tuple[Circuit | None, Task | None, list[str], list[str], dict[str, str]]:
        graph = self._graph
        return *self._of(), list(graph.cut), list(graph.forced), dict(graph.question)

    def read(self, after: str | None = None) -> None:
        """Read the selected node in the full model and in the circuit as it is now; after other work, not instead."""
        (circuit, task), graph, panel = self._of(), self._graph, self._panel
        if len(graph.selected) != 1 or task is None or panel._runner.job not in (None, _READ, after):
            return
        (node,), model = graph.selected, panel.model
        played = None if circuit is None else graph.played if graph.cut or graph.forced else circuit
        own = self._play.value.own if graph.question and self._play.value else None
        asked = (node, circuit, task, tuple(graph.cut), tuple(graph.forced), own)
        if self._read == (asked, model.digest) and graph.reading.get("node") == node:
            return

        def show(*runs: dict[str, Any]) -> None:
            with panel._lock:
                if graph.selected == [node] and self._of() == (circuit, task):
                    graph.reading = {"node": node, "runs": list(runs)}

        def job(progress: ProgressCallback) -> None:
            digest = model.digest
            whole = self._full.get((digest, task, node), lambda: read_node(model, task, node))
            if own is not None:
                whole = [*whole, *read_node(model, own.prompts, node)]
            show(full := {"run": "the full model", "prompts": whole})
            if played is not None:
                progress(1, 2, "")
                kind = played.ablation
                cuts = self._cuts.get((digest, task, kind), lambda: make_ablation(model, task, kind))
                of = [task, *([] if own is None else [own.prompts])]
                alone = [one for some in of for one in read_node(model, some, node, circuit=played, ablation=cuts)]
                show(full, {"run": "the circuit alone, as it is now", "prompts": alone})
            self._read = asked, digest

        panel._start(_READ, job, stage=f"Reading {node}")
