"""Edit one fact with widgets, and look at what changed.

The panel holds at most one edit: what is on screen is in the weights until Undo or another edit. What it shows comes
from `kcwb.editing`, and is kept in attributes, so that a notebook can go on with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.editing.edit import Edit, default_layer, edit
from kcwb.editing.registry import METHODS
from kcwb.editing.scores import generate
from kcwb.errors import DataError, SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.studies.editing_account.comparison import EditComparison, compare_edit
from kcwb.tasks.prompts import make_task
from kcwb.tasks.relations import Fact, Relation, load_relation, relation_files
from kcwb.workbench import tables
from kcwb.workbench.graph.page import GraphView, graph_view
from kcwb.workbench.panels.base import ROW, Panel, brief, button, dropdown, picture, room
from kcwb.workbench.plots import plot_lens

_NEIGHBOURS = 3  # other subjects whose continuations are shown
_PAGES = ("What it says", "Lens", "Circuits", "Which way", "Roles", "Optimisation")


@dataclass(frozen=True)
class _Found:
    """One edit and what was found about it."""

    made: Edit
    said: pd.DataFrame
    comparison: EditComparison | None
    note: str


class EditPanel(Panel):
    """Choose a fact, its new object, a method and a layer; see the model before and after; undo.

    Closing the panel undoes its edit. One that is let go without `close` leaves its edit in the weights.

    Parameters
    ----------
    model
        The model.
    relation
        What to start with: the name of a packaged relation, a file's path, or a Relation.
    subject, target
        The fact and its new object; default: the relation's first fact, and its next object.
    method, layer
        As in `kcwb.editing.edit.edit`.
    template
        The index of one of the relation's zero-shot templates.
    compare
        Whether circuits are compared, too, which takes longer than the edit.
    edges, movers, draws, n, seed
        As in `kcwb.studies.editing_account.comparison.compare_edit`; `n` facts tell the mover heads.
    settings
        The method's own settings, by method: `{"rome": {"clamp": 3.0}}`.

    Attributes
    ----------
    edit
        The edit on screen; None after Undo.
    said
        What the model says before and after, as a table.
    comparison
        The EditComparison; None where circuits were not compared.

    Raises
    ------
    DataError, SettingError
        If the relation cannot be read, has no such fact, or a setting is not known.

    Examples
    --------
    >>> panel = EditPanel(model, "country_capital", subject="France", target="Rome")  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.said  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        relation: Relation | str = "country_capital",
        *,
        subject: str | None = None,
        target: str | None = None,
        method: str = "rome",
        layer: int | None = None,
        template: int = 0,
        compare: bool = True,
        edges: int = 300,
        movers: int | Sequence[str] = 10,
        draws: int = 100,
        n: int = 8,
        seed: int = 0,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        choose("The method", method, METHODS)
        layer = default_layer(model, method) if layer is None else layer
        if not 0 <= layer < model.graph.n_layers:
            raise SettingError(f"layer={layer}: {model.name} has layers 0 to {model.graph.n_layers - 1}.")
        given = relation if isinstance(relation, Relation) else load_relation(relation)
        given.template(template)
        row = _row(given, subject)
        super().__init__()
        self.model = model
        self.edit: Edit | None = None
        self.said: pd.DataFrame | None = None
        self.comparison: EditComparison | None = None
        self._more: dict[str, Any] = {"edges": edges, "movers": movers, "draws": draws, "seed": seed}
        self._n, self._settings = n, settings or {}
        self._relations: dict[str, Any] = {**relation_files(), given.name: given}
        names = sorted(self._relations)
        self._relation = dropdown("Relation", [(brief(name), name) for name in names], given.name)
        self._template = dropdown("Template", _templates(given), template, wide=True)
        self._fact = dropdown("Fact", _facts(given), row, wide=True)
        self._target = W.Combobox(description="New object", ensure_option=False, layout=room(205))
        self._method = dropdown("Method", list(METHODS), method)
        self._layer = W.BoundedIntText(
            layer, min=0, max=model.graph.n_layers - 1, description="Layer", layout=room(120)
        )
        self._compare = W.Checkbox(compare, description="Compare circuits", indent=False, layout=room(150))
        self._run_button = button("Edit", "pencil", button_style="primary")
        self._undo_button = button("Undo", "undo")
        self._summary = W.HTML()
        self._pages = {name: W.HTML(layout=W.Layout(width="100%")) for name in _PAGES}
        self._offer_targets()
        if target is not None:
            self._target.value = target
        self._connect()
        self._lay_out()

    # --- in a script ---

    @property
    def settings(self) -> dict[str, Any]:
        """What Edit would do."""
        fact = self._chosen()
        return {
            "relation": self._relation.value,
            "template": self._source().prompt_templates_zs[self._number],
            "subject": fact.subject,
            "object": fact.object,
            "target": self._target.value,
            "method": self._method.value,
            "layer": self._layer.value,
        }

    def run(self) -> None:
        """Make the edit on screen, compare, and leave it in the weights; returns at once, see `wait`.

        The edit that stands is put back, bit for bit, if the new one is refused, fails or is cancelled.
        """
        self._message.value = ""
        relation, fact, target = self._source(), self._chosen(), str(self._target.value)
        number, compare = self._number, bool(self._compare.value)
        method, layer = str(self._method.value), self._layer.value
        template = relation.prompt_templates_zs[number]

        def find(progress: ProgressCallback) -> _Found:
            self._enter(f"Looking for the {method} edit", progress)
            more = self._settings.get(method, {})
            made = edit(self.model, fact, target, method, template=template, layer=layer, progress=progress, **more)
            self._enter("Listening to the model", progress)
            said = _said(self.model, made, relation, number)
            comparison, note = None, ""
            if compare:
                self._enter(f"Asking {self.model.name} for the facts", progress)
                try:
                    task = make_task(self.model, relation, n=self._n, template=number, progress=progress)
                    self._enter("Comparing circuits", progress)
                    comparison = compare_edit(self.model, made, task, progress=progress, **self._more)
                except DataError as error:  # the edit is good, whatever cannot be compared
                    note = str(error)
            progress(0, 0, "")  # the last moment for a cancel
            return _Found(made, said, comparison, note)

        def job(progress: ProgressCallback) -> None:
            standing = self.edit
            if standing is not None:
                standing.undo()
            try:
                found = find(progress)
                found.made.apply()
            except BaseException:
                if standing is not None:
                    standing.apply()
                raise
            self._show_found(found)

        self._start("edit", job)

    def undo(self) -> None:
        """Take the edit out of the weights, when nobody else runs the model; what was found stays on screen.

        Raises
        ------
        EditError
            If another edit was put in on top of it.
        """
        with self.model.exclusive():  # before the lock of what is shown, as the worker takes them
            self._take_out()

    def _take_out(self) -> None:
        with self._lock:
            if self.edit is not None:
                self.edit.undo()
                self._draw_summary(self.edit, "Undone: the weights are what they were.")
                self.edit = None

    def _undo_clicked(self) -> None:
        """Undo at once if the model is free. If not, wait for it on the worker: this thread has what is shown."""
        hold = self.model.exclusive(_refuse_to_wait)
        try:
            with hold:
                self._take_out()
        except _Busy:
            self._start("undo", lambda progress: self._take_out())

    def _leave(self) -> None:
        self.undo()

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        if self.said is None:
            return tables.styled(tables.heading("Settings"), tables.pairs(self.settings), self._message.value)
        pages = [part for name in _PAGES for part in (tables.heading(name), self._pages[name].value)]
        return tables.styled(self._message.value, self._summary.value, *pages)

    # --- making ---

    def _source(self) -> Relation:
        found = self._relations[str(self._relation.value)]
        return found if isinstance(found, Relation) else load_relation(found)

    @property
    def _number(self) -> int:
        """Which template is chosen."""
        return int(self._template.value or 0)

    def _chosen(self) -> Fact:
        return self._source().facts[int(self._fact.value or 0)]

    def _connect(self) -> None:
        self._relation.observe(self._guarded(lambda _: self._offer_facts()), "value")
        self._fact.observe(self._guarded(lambda _: self._offer_targets()), "value")
        self._run_button.on_click(self._guarded(lambda _: self.run()))
        self._undo_button.on_click(self._guarded(lambda _: self._undo_clicked()))

    def _lay_out(self) -> None:
        rows = [
            [self._relation, self._template],
            [self._fact, self._target],
            [self._method, self._layer, self._compare],
            [self._run_button, self._undo_button, *self._progress],
        ]
        pages = W.Tab([self._pages[name] for name in _PAGES], titles=_PAGES)
        self._result = W.VBox([self._summary, pages], layout=W.Layout(display="none"))
        self._assemble(*(W.HBox(row, layout=ROW) for row in rows), self._message, self._result)

    def _offer_facts(self) -> None:
        relation = self._source()
        with self._silently():
            self._template.options, self._template.value = _templates(relation), 0
            self._fact.options, self._fact.value = _facts(relation), 0
            self._offer_targets()

    def _offer_targets(self) -> None:
        fact, objects = self._chosen(), self._source().objects
        others = [name for name in objects if name != fact.object]
        self._target.options = others
        place = objects.index(fact.object)
        self._target.value = objects[(place + 1) % len(objects)] if others else ""

    # --- drawing ---

    def _show_found(self, found: _Found) -> None:
        with self._lock:
            self.edit, self.said, self.comparison = found.made, found.said, found.comparison
            if found.note:
                self._say("kc-note", f"Circuits were not compared. {found.note}")
            self._draw_summary(found.made, "In the weights now.")
            self._draw_pages(found.made)
            self._result.layout.display = ""

    def _draw_summary(self, made: Edit, state: str) -> None:
        line = f'<div class="kc-summary">{tables.text(f"{made!r}, {made.seconds:.1f} s. {state}", 1000)}</div>'
        self._summary.value = tables.styled(line)

    def _draw_pages(self, made: Edit) -> None:
        found, pages = self.comparison, self._pages
        assert self.said is not None  # set in the line before the call
        pages["What it says"].value = tables.styled(tables.table(self.said))
        pages["Optimisation"].value = tables.styled(tables.table(made.losses, scroll=True))
        if found is None:
            for name in ("Lens", "Circuits", "Which way", "Roles"):
                pages[name].value = tables.styled(tables.muted("Circuits were not compared."))
            return
        states = {state: part for state, part in found.lens.groupby("state", sort=False)}
        pages["Lens"].value = tables.styled(
            *(
                picture(plot_lens(part, title=f"{state} the edit"), f"Logit lens of old and new object, {state}")
                for state, part in states.items()
            )
        )
        titles = {"before": "Before: the old object", "after": "After: the new object"}
        graphs = "".join(_half(graph_view(found.circuits[name], height=420, title=titles[name])) for name in titles)
        overlap = tables.table(found.overlap.reset_index())
        pages["Circuits"].value = tables.styled(f'<div style="display:flex;flex-wrap:wrap">{graphs}</div>', overlap)
        pages["Which way"].value = tables.styled(
            tables.table(found.transport),
            tables.muted(
                "TE: the share of the edit's effect that goes when these outputs are put back to what they were; for "
                "random heads the mean and 95% of the draws. "
                + ("Too few heads are left to draw from." if math.isnan(found.p) else f"p = {found.p:.3f}.")
            ),
        )
        pages["Roles"].value = tables.styled(tables.table(found.roles, scroll=True))


class _Busy(Exception):
    """Another thread has the model."""


def _refuse_to_wait(done: int, total: int, note: str) -> None:
    raise _Busy


def _half(view: GraphView) -> str:
    """A graph beside another, below it where there is no room."""
    return f'<div style="flex:1 1 420px;min-width:0">{view._repr_html_()}</div>'


def _templates(relation: Relation) -> list[tuple[str, int]]:
    return [(brief(text), i) for i, text in enumerate(relation.prompt_templates_zs)]


def _facts(relation: Relation) -> list[tuple[str, int]]:
    return [(brief(f"{fact.subject} → {fact.object}"), i) for i, fact in enumerate(relation.facts)]


def _row(relation: Relation, subject: str | None) -> int:
    if subject is None:
        return 0
    subjects = [fact.subject for fact in relation.facts]
    choose(f"The subject in {relation.name}", subject, subjects)
    return subjects.index(subject)


def _said(model: Model, made: Edit, relation: Relation, number: int) -> pd.DataFrame:
    """Continuations before and after: the prompt, its paraphrases, and the prompt about other subjects."""
    fact, templates = made.facts[0], relation.prompt_templates_zs
    others = [one for one in relation.facts if one.subject != fact.subject]
    near = sorted(others, key=lambda one: one.object != fact.object)[:_NEIGHBOURS]
    asked = [("edited", templates[number].replace("{}", fact.subject))]
    asked += [("other words", t.replace("{}", fact.subject)) for i, t in enumerate(templates) if i != number]
    asked += [("other subject", templates[number].replace("{}", one.subject)) for one in near]
    before = [generate(model, text) for _, text in asked]
    with made:
        after = [generate(model, text) for _, text in asked]
    kinds, prompts = zip(*asked, strict=True)
    return pd.DataFrame({"asked": kinds, "prompt": prompts, "before": before, "after": after})
