"""What of a graph can be kept without a kernel: its page, as notebooks and reports hold it, and picture files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anywidget
import traitlets as T

from kcwb.errors import CircuitError, choose
from kcwb.files import atomic_path
from kcwb.outputs import GRAPH, check_output
from kcwb.verbs import verb
from kcwb.workbench.graph.drawing import Drawing
from kcwb.workbench.graph.page import GraphView, view_of
from kcwb.workbench.graph.state import CHECKS, is_blank
from kcwb.workbench.lasting import Place, drawn, renew, show

_DRAWN = ("scene", "pinned", "cut", "forced", "groups", "names", "notes", "answers")
NONE = "There is no circuit yet: graph.show(circuit)."


class Kept(anywidget.AnyWidget):
    """A widget with a drawing, and with traits by the names of CHECKS."""

    _drawing: Drawing | None = None
    _places: dict[str, Place]  # where it is shown
    _told: tuple[Any, ...] = ()  # what was so at the last change
    height: Any
    view: Any

    def as_view(self) -> GraphView:
        """The graph as a page, as it is now: what is cut, pinned, grouped, named, noted and answered.

        Raises
        ------
        CircuitError
            If there is no circuit yet.
        """
        if self._drawing is None:
            raise CircuitError(NONE)
        kept = set(CHECKS) - {"asked", "view", "question"}
        state = {name: value for name in CHECKS if name in kept and not is_blank(value := getattr(self, name))}
        return view_of(self._drawing, self.height, state)

    @verb
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the graph as it is seen, as a drawing: what is selected, cut, grouped, hidden, and as it is zoomed.

        Parameters
        ----------
        path
            Ends with `.pdf` (for LaTeX: vectors, fonts embedded, no margins), `.svg` or `.png`.
        force
            Overwrite also a file that kcwb did not write.

        Raises
        ------
        SettingError
            If the name ends otherwise, or the file cannot be written.
        CircuitError
            If there is no circuit yet.
        """
        from kcwb.workbench.graph.figure import figure_of, save_figure

        target = Path(path)
        kind = choose("The kind of file, which its name ends with,", target.suffix[1:].lower(), ("pdf", "svg", "png"))
        if self._drawing is None:
            raise CircuitError(NONE)
        check_output(target, GRAPH, what="The picture", force=force, make_folder=True)
        state = {name: getattr(self, name) for name in CHECKS}
        with atomic_path(target) as draft:
            save_figure(figure_of(self._drawing, state, self.view, self.height), str(draft), kind)

    def _repr_html_(self) -> str:
        return "" if self._drawing is None else self.as_view()._repr_html_()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, "text/html": drawn(self._repr_html_)}, metadata

    def _ipython_display_(self) -> None:
        closed = {"text/plain": repr(self), "text/html": drawn(self._repr_html_)}
        show(self, closed if self.comm is None else self._repr_mimebundle_()[0], self._places)

    @T.observe(*_DRAWN)
    def _renew(self, change: Any) -> None:
        """Draw the page anew where the graph is shown, for the notebook as it is saved; once for each step."""
        before, self._told = self._told, tuple(getattr(self, name) for name in _DRAWN)
        if self._places and self.comm is not None and before != self._told:  # an answer comes within its step
            renew(self, self._repr_mimebundle_()[0], self._places)
