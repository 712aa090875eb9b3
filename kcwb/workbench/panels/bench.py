"""The referee in a discovery panel: what it is asked with, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ipywidgets as W

from kcwb.errors import SettingError
from kcwb.evaluation.referee.judgement import Judgement
from kcwb.evaluation.referee.referee import referee
from kcwb.progress import ProgressCallback
from kcwb.workbench import tables, verdicts
from kcwb.workbench.panels.life import Living
from kcwb.workbench.panels.results import Found
from kcwb.workbench.panels.widgets import Group, room, rows, the_file, wide
from kcwb.workbench.report.judgement import judgement_page

_UNASKED = "Press Judge: is this a circuit? Some tens of seconds; thoroughly, some minutes."


class Bench(Group):
    """Two buttons, how thorough it is to be, a place for its page, and the verdicts with the two pictures.

    It is asked on the worker of `panel`; `shown` gives what is on screen there.
    """

    def __init__(self, panel: Living, shown: Callable[[], Found | None]) -> None:
        self._panel, self._shown = panel, shown
        self._drawn: tuple[Judgement, str] | None = None  # the last one, and its HTML: pictures take a second
        tip = "Is this a circuit? On facts that it was not found on"
        self.judge_button = panel._button("Judge", "balance-scale", self.judge, tooltip=tip)
        self.thorough = W.Checkbox(False, description="thoroughly", indent=False, layout=W.Layout(width="auto"))
        self.path = W.Text("verdict.html", description="Page", layout=room(320))
        self.save_button = panel._button("Save", "download", lambda: self.save(self.path.value))
        self.said = wide()
        self.widget = W.VBox(rows([self.judge_button, self.thorough], self.said, [self.path, self.save_button]))
        self.draw()

    @property
    def judgement(self) -> Judgement | None:
        """What the referee says of the circuit on screen; None until `judge` is done."""
        found = self._shown()
        return found.judgement if found else None

    def judge(self) -> None:
        """Ask the referee of the circuit on screen; returns at once, see the panel's `wait`."""
        found, quick, panel = self._shown(), not self.thorough.value, self._panel
        if found is None or found.task is None:
            raise SettingError("A circuit is judged on facts: press Run, or load one whose relation is at hand.")
        circuit, task = found.circuit, found.task

        def job(progress: ProgressCallback) -> Judgement:
            judgement = referee(panel.model, circuit, task, quick=quick, progress=progress)
            self._html(judgement)
            return judgement

        def done(judgement: Judgement) -> None:
            if found.circuit is circuit:  # and was not cut to another size meanwhile
                found.judgement = judgement
            else:
                panel._say("kc-note", "The circuit was cut to another size meanwhile: press Judge again.")
            self.draw()

        panel._begin("judgement", job, done, "Asking the referee")

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write what the referee says as a page, as `kcwb.judgement_page` does."""
        if self.judgement is None:
            raise SettingError("There is no judgement to save yet: press Judge.")
        target = judgement_page(self.judgement, the_file(path, "verdict.html"), force=force)
        self._panel._say("kc-note", f"Saved to {target.resolve()}")

    def draw(self) -> None:
        """What the referee says of the circuit on screen, if it was asked."""
        self.said.value = tables.styled(self.to_html() or tables.muted(_UNASKED))

    def to_html(self) -> str:
        """The verdicts, a warning where facts are few, the pictures with their sentences; empty if it was not asked."""
        judgement = self.judgement
        return self._html(judgement) if judgement else ""

    def _html(self, judgement: Judgement) -> str:
        if self._drawn is None or self._drawn[0] is not judgement:
            self._drawn = judgement, _html(judgement)
        return self._drawn[1]


def _html(judgement: Judgement) -> str:
    few = verdicts.few_facts(judgement)
    note = f'<div class="kc-note">{tables.text(few, 2000)}</div>' if few else ""
    drawn = [
        f'<div style="flex:1 1 420px;min-width:0">{tables.heading(one.heading)}{one.body}'
        f"{tables.muted(one.words)}</div>"
        for one in verdicts.pictures(judgement)[:2]
    ]
    said = tables.summary(verdicts.headline(judgement)) + note + verdicts.verdict_table(judgement)
    return said + tables.beside(*drawn)
