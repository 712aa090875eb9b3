"""A circuit asked its facts as it is played in a panel's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kcwb.circuits.circuit import Circuit
from kcwb.evaluation.play import Play
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.tasks.task import Task
from kcwb.workbench.graph.widget import CircuitGraph, lead
from kcwb.workbench.panels.runner import Job, Latest


class Playing:
    """Makes jobs that answer what is cut and forced in a graph; of one circuit, all go on from the last answer.

    Parameters
    ----------
    model, graph
        The model, and the graph that is played in; it is dimmed meanwhile.
    enter
        Names what a job does next.
    """

    def __init__(self, model: Model, graph: CircuitGraph, enter: Callable[[str, ProgressCallback], None]) -> None:
        self._model, self._graph, self._enter, self._latest = model, graph, enter, Latest[Play]()

    def job(self, circuit: Circuit, task: Task) -> Job:
        """One that gives what the circuit answers, as `CircuitGraph.answers` takes it, as it is in the graph now."""
        cut, forced = list(self._graph.cut), list(self._graph.forced)

        def job(progress: ProgressCallback) -> dict[str, Any]:
            self._enter("Asking the circuit as it is now", progress)
            self._graph.busy = True
            try:
                play = self._latest.get((circuit, task), lambda: Play(self._model, circuit, task))
                return lead(play, cut, forced)
            finally:
                self._graph.busy = False

        return job
