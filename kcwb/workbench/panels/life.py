"""The life of a panel: its worker with progress and messages, its place on screen, and its end."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import ipywidgets as W

from kcwb.errors import KcwbError, SettingError
from kcwb.locks import WAITING
from kcwb.progress import ProgressCallback
from kcwb.workbench import tables
from kcwb.workbench.graph.widget import CircuitGraph
from kcwb.workbench.lasting import Place, drawn, here, renew, show
from kcwb.workbench.panels.echo import Echo
from kcwb.workbench.panels.notes import notes
from kcwb.workbench.panels.runner import Job, Runner
from kcwb.workbench.panels.widgets import Group, button, duration, widgets_in

if TYPE_CHECKING:
    from kcwb.models.loading import Model

PANEL_CLASS = "kcwb-panel"
"""The CSS class of a whole panel."""

_REDRAW = 0.1  # seconds between two drawings of the progress bar
_DONE = ("pinned", "groups", "names", "notes", "cut", "forced")  # by a person to a graph
_LOCK = threading.RLock()
"""Held while what any panel shows is changed, by whichever thread: one for all, since panels hold one another."""
_SHOWN: dict[str, tuple[str, list[weakref.ref[Living]]]] = {}
"""By cell: in which of its runs it showed panels last, and which."""


class Living:
    """Widgets with a worker.

    From the first job to the last that follows from it, drawing included, a panel has the model to itself: what it
    shows together is of one state of the weights. Meanwhile other panels on the model wait, and say so.

    A panel lives until `close`, or until nothing holds it any more: no name of yours, no cell that shows it and was not
    run again since, nobody who took its `widget`, no running job. Then its widgets go, too. What a cell's last line
    shows is also kept by IPython, in `Out`: end the cell with `display(panel)` instead, or close the panel.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._lock, self._quiet = _LOCK, False
        self._runner = Runner(on_change=self._show_state, on_error=self._tell, hold=model.exclusive)
        self._stage, self._stage_started, self._drawn = "", 0.0, 0.0
        self._begun, self._stopped = "", False  # what a person asked for last; whether that was cancelled
        self._places: dict[str, Place] = {}  # where it is shown
        self._works: list[Callable[[Any], None]] = []  # what our widgets' callbacks do
        self._bar = W.FloatProgress(min=0, max=1, layout=W.Layout(width="220px", margin="0"))
        self._status, self._message = W.HTML(), W.HTML()
        self._cancel_button = self._button("Cancel", "stop", self.cancel)
        self._progress = (self._cancel_button, self._bar, self._status)
        self._echo = Echo()
        self._root: Any = W.VBox(layout=W.Layout(width="100%", max_width="1100px"))
        self._root.kept = {}  # the panel itself, by those who need it as long as the widget is there
        self._root.add_class(PANEL_CLASS)
        self._owned = widgets_in(vars(self))
        self._let_go = weakref.finalize(self, _close, self._owned)
        self._let_go.atexit = False  # pages that show the panel outlive the kernel
        self._show_state()

    @property
    def widget(self) -> W.VBox:
        """The whole panel, to be put into other widgets; whoever takes it keeps the panel, until `close`."""
        self._keep("its taker", True)
        return self._root

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._let_go.alive

    def close(self) -> None:
        """Stop what is running and wait for its end, then let the widgets go; results stay in the attributes.

        On screen the panel is replaced by its plain drawing. In a `with` block, the panel is closed at its end.
        """
        if self.closed:
            return
        self._runner.close()
        self._leave()
        self._refresh()
        self._places.clear()
        self._let_go()
        self._root.kept = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except KcwbError as trouble:
            if error is None:
                raise
            error.add_note(str(trouble))  # which must not hide what went wrong first

    @property
    def state(self) -> str:
        """`idle`, `running`, `failed` or `done`."""
        return self._runner.state

    @property
    def error(self) -> BaseException | None:
        """What the latest run failed with."""
        return self._runner.error

    def cancel(self) -> None:
        """Stop what is running at its next report; what is on screen stays."""
        self._stopped = self.state == "running"
        if self._stopped:
            self._status.value = _line("Stopping…")
        self._runner.cancel()

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is running, so that a notebook executed from top to bottom holds the result.

        Raises
        ------
        TimeoutError
            If that takes longer than `timeout` seconds.
        KcwbError
            What the run failed with, if it did.
        """
        if not self._runner.wait(timeout):
            raise TimeoutError(f"The panel is still running after {timeout} s: {self._stage}.")
        self._refresh()
        if self.state == "failed" and self.error is not None:
            raise self.error

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        raise NotImplementedError

    def _leave(self) -> None:
        """What else is to be done when the panel is closed; nothing is running then."""

    # --- widgets and what they set off ---

    def _assemble(self, *children: W.Widget) -> None:
        """The panel from top to bottom, when all of its widgets are made."""
        self._root.children = [W.HTML(tables.STYLE), self._echo, *children]
        self._adopt()
        for graph in (one for one in self._owned if isinstance(one, CircuitGraph)):
            for trait in _DONE:
                self._on(graph, lambda _: self._refresh(), trait)

    def _adopt(self, *more: Group) -> None:
        """Close the widgets that are there by now, too, even if the panel is refused before it is whole."""
        self._owned[:] = widgets_in(vars(self), *more)

    def _on(self, widget: W.Widget, work: Callable[[Any], None], trait: str = "value") -> None:
        widget.observe(self._guarded(work), trait)

    def _press(self, widget: W.Button, work: Callable[[], None]) -> None:
        widget.on_click(self._guarded(lambda _: work()))

    def _button(self, words: str, icon: str, work: Callable[[], None], **more: Any) -> W.Button:
        made = button(words, icon, **more)
        self._press(made, work)
        return made

    def _start(self, name: str, job: Job, on_done: Callable[[Any], None] | None = None, stage: str = "") -> None:
        """Run a job on the worker; the latest wins. Its warnings are told as notes, and its end with all locked."""
        if self.closed:
            raise SettingError("This panel is closed. Make another one.")

        def noting(progress: ProgressCallback) -> Any:
            if stage:
                self._enter(stage, progress)
            with notes() as texts:
                result = job(progress)
            if texts:
                self._say("kc-note", "\n".join(dict.fromkeys(texts)))
            return result

        def done(result: Any) -> None:
            with self._lock:
                if on_done is not None:
                    on_done(result)

        self._stopped = False
        self._runner.submit(name, noting, done, self._report)

    def _begin(self, name: str, job: Job, on_done: Callable[[Any], None] | None = None, stage: str = "") -> None:
        """Start what a person asks for: what was said before goes, and what they asked for before is stopped."""
        self._message.value = ""
        self._tell_stopped(name)
        self._begun = name
        self._start(name, job, on_done, stage)

    def _tell_stopped(self, by: str) -> None:
        """Say what a person asked for and another job is about to stop."""
        if self._runner.job == self._begun != by:
            self._say("kc-note", f"Stopped for this: {self._begun}.")

    def _enter(self, stage: str, progress: ProgressCallback) -> None:
        """Name what a job does next."""
        self._stage, self._stage_started, self._drawn = stage, time.monotonic(), 0.0
        progress(0, 0, "")

    def _say(self, kind: str, words: str) -> None:
        """Say an error (`kc-error`) or a remark (`kc-note`)."""
        escaped = "\n".join(tables.text(line, 4000) for line in words[:4000].splitlines())
        self._message.value = f'<div class="kcwb"><div class="{kind}" role="alert">{escaped}</div></div>'

    def _tell(self, error: BaseException) -> None:
        if isinstance(error, (KcwbError, OSError)):
            words = str(error)
        elif isinstance(error, MemoryError):
            words = "There is not enough memory for this. Take fewer facts, or a smaller model."
        else:
            words = f"{type(error).__name__}: {error}\nThis should not happen; the object is kept in panel.error."
        self._say("kc-error", words)

    def _guarded(self, work: Callable[[Any], None]) -> Callable[[Any], None]:
        """A callback for widgets: one at a time, not for our own changes, and what it raises is told.

        ipywidgets keeps all widgets, which must not keep the panel: they know it weakly, and it knows the work.
        """
        number, known = len(self._works), weakref.ref(self)
        self._works.append(work)

        def callback(event: Any) -> None:
            panel = known()
            if panel is not None:
                panel._answer(panel._works[number], event)

        return callback

    def _answer(self, work: Callable[[Any], None], event: Any) -> None:
        with self._lock:
            if self._quiet:
                return
            try:
                work(event)
            except Exception as error:
                self._tell(error)

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Change widgets without calling their callbacks."""
        with self._lock:
            before, self._quiet = self._quiet, True
            try:
                yield
            finally:
                self._quiet = before

    # --- progress ---

    def _show_state(self) -> None:
        running = self._runner.state == "running"
        self._cancel_button.disabled = not running
        self._bar.layout.display = "" if running else "none"
        if not running:
            ended = {"failed": "Failed", "idle": "Stopped" if self._stopped else ""}.get(self._runner.state)
            self._status.value = _line(f"{ended}; what was found before stays.") if ended else ""
            self._refresh()

    def _report(self, done: int, total: int, note: str) -> None:
        """Draw the progress, but not more often than an eye can follow."""
        if note == WAITING:
            self._stage, self._status.value = WAITING, _line(f"{WAITING.capitalize()}…")
            return
        now = time.monotonic()
        if now - self._drawn < _REDRAW and done < total:
            return
        self._drawn = now
        self._bar.value = done / total if total else 0.0
        words = self._stage
        if total:
            words += f": {done:,} of {total:,}" + (f", {note}" if note else "")
        if 0 < done < total:
            words += f" · {duration((now - self._stage_started) / done * (total - done))} left"
        self._status.value = _line(words)

    # --- display ---

    def _keep(self, by: str, kept: bool) -> None:
        """Let the widgets hold the panel, as ipywidgets holds them; or let it go."""
        self._root.kept.pop(by, None)
        if kept and not self.closed:
            self._root.kept[by] = self

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle = {} if self.closed else dict(self._root._repr_mimebundle_() or {})
        return {**bundle, "text/plain": repr(self), "text/html": drawn(self.to_html)}

    def _ipython_display_(self) -> None:
        """Show the widgets, and their plain drawing under an id by which it can be renewed."""
        show(self._root, self._repr_mimebundle_(), self._places)
        if self._places:
            _keep_on_screen(self)

    def _refresh(self) -> None:
        """Renew the plain drawings, which a saved notebook holds."""
        if self._places:
            renew(self._root, self._repr_mimebundle_(), self._places)


def _keep_on_screen(panel: Living) -> None:
    """Let the cell that shows a panel hold it, and no longer those that an earlier run of the cell showed."""
    cell, run = here()
    before, shown = _SHOWN.get(cell, ("", []))
    if before != run:
        for earlier in filter(None, (known() for known in shown)):
            earlier._keep(cell, False)
        shown = []
    panel._keep(cell, True)
    _SHOWN[cell] = run, [*shown, weakref.ref(panel)]


def _close(widgets: list[W.Widget]) -> None:
    for widget in widgets:
        widget.close()


def _line(words: str) -> str:
    return f'<span class="kcwb"><span class="kc-muted">{tables.text(words)}</span></span>'
