"""Edit facts with widgets, and look at what changed.

What is on screen is in the weights until Undo or another edit. That takes the earlier one's place, or, with *On top*,
is found in the weights that the earlier ones have left, and put on top of them. What the panel shows comes from
`kcwb.editing`, and is kept in attributes, so that a notebook can go on with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ipywidgets as W
import numpy as np
import pandas as pd

from kcwb.editing.answers import says
from kcwb.editing.edit import Edit, default_layer, edit
from kcwb.editing.registry import METHODS
from kcwb.editing.writing import continuations
from kcwb.errors import DataError, SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.studies.editing_account.comparison import EditComparison, compare_edit
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import make_task
from kcwb.workbench import tables
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.picker import Picker
from kcwb.workbench.panels.runner import Job
from kcwb.workbench.panels.widgets import brief, button, dropdown, room
from kcwb.workbench.plots import picture, plot_lens

_CIRCUITS = {"before": "before: the old object", "after": "after: the new object"}
_NEIGHBOURS, _TOKENS = 3, 12  # other subjects whose continuations are shown, and how long these are


@dataclass(frozen=True)
class _Found:
    made: Edit
    said: pd.DataFrame
    comparison: EditComparison | None
    note: str


class EditPanel(Panel):
    """Choose a fact, its new object, a method and a layer; see the model before and after; undo.

    Closing the panel undoes its edits. One that is let go without `close` leaves them in the weights.

    Parameters
    ----------
    model, relation
        As in `Panel` and `Picker`.
    subject, target
        The fact and its new object; default: the relation's first fact, and its next object.
    method, layer
        As in `kcwb.editing.edit.edit`.
    template
        The index of one of the relation's zero-shot templates.
    compare
        Whether circuits are compared, too, which takes longer than the edit.
    on_top
        Whether edits are put on top of the earlier ones, instead of in their place.
    edges, movers, draws, n, seed
        As in `kcwb.studies.editing_account.comparison.compare_edit`; `n` facts tell the mover heads.
    settings
        The method's own settings, by method: `{"rome": {"clamp": 3.0}}`.

    Attributes
    ----------
    edit
        The edit that was put in last; None where none is in.
    edits
        All edits that are in, the first at the bottom.
    said
        What the model says before and after the last edit, as a table; of earlier edits, too. `target` is the new
        object, and `says it`, whether what is said after begins with it (`kcwb.editing.answers`).
    comparison
        The EditComparison; None where circuits were not compared.

    Examples
    --------
    >>> panel = EditPanel(model, "country_capital", subject="France", target="Rome")  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.said  # doctest: +SKIP
    """

    pages = ("What it says", "Lens", "Circuits", "Which way", "Roles", "Optimisation")
    graphs: ClassVar = {"Circuits": 460}

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
        on_top: bool = False,
        edges: int = 300,
        movers: int | Sequence[str] = 10,
        draws: int = 100,
        n: int = 8,
        seed: int = 0,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        choose("The method", method, METHODS)
        layer, last = default_layer(model, method) if layer is None else layer, model.graph.n_layers - 1
        if not 0 <= layer <= last:
            raise SettingError(f"layer={layer}: {model.name} has layers 0 to {last}.")
        super().__init__(model, button("Edit", "pencil", button_style="primary"))
        self.edits: tuple[Edit, ...] = ()
        self.said: pd.DataFrame | None = None
        self.comparison: EditComparison | None = None
        self._more: dict[str, Any] = {"edges": edges, "movers": movers, "draws": draws, "seed": seed}
        self._n, self._settings = n, settings or {}
        self.picker = Picker(self, relation, template=template, subject=subject, on_change=self._offer_targets)
        self._target = W.Combobox(description="New object", ensure_option=False, layout=room(205))
        self._method = dropdown("Method", list(METHODS), method)
        self._layer = W.BoundedIntText(layer, min=0, max=last, description="Layer", layout=room(120))
        self._compare = W.Checkbox(compare, description="Compare circuits", indent=False, layout=room(150))
        self._on_top = W.Checkbox(on_top, description="On top of earlier edits", indent=False, layout=room(190))
        self._undo_button = self._button("Undo", "undo", self._undo_clicked)
        self._offer_targets()
        if target is not None:
            self._target.value = target
        self._lay_out(
            [self.picker.relation, self.picker.template],
            [self.picker.fact, self._target],
            [self._method, self._layer, self._compare, self._on_top],
            buttons=(self._undo_button,),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What Edit would do."""
        how = {"target": self._target.value, "method": self._method.value, "layer": self._layer.value}
        return {**self.picker.settings, **how}

    @property
    def edit(self) -> Edit | None:
        """The edit that was put in last."""
        return self.edits[-1] if self.edits else None

    def run(self) -> None:
        """Make the edit on screen, compare, and leave it in the weights; returns at once, see `wait`.

        The edits that stand are put back, bit for bit, if the new one is refused, fails or is cancelled.
        """
        self._begin("edit", self._job())

    def undo(self) -> None:
        """Take the last edit out of the weights, when nobody else runs the model; what was found stays on screen.

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
                *below, made = self.edits
                left = f"{len(below)} earlier still in." if below else "The weights are what they were."
                self._tell_state(made, f"Undone. {left}")
                self.edits = tuple(below)

    def _undo_clicked(self) -> None:
        """Undo at once if the model is free. If not, wait for it on the worker: this thread has what is shown."""
        if not self.edits and self.state != "running":
            raise SettingError("There is no edit to undo: press Edit.")
        hold = self.model.exclusive(_refuse_to_wait)
        try:
            with hold:
                self._take_out()
        except _Busy:
            self._begin("undo", lambda progress: self._take_out())

    def _leave(self) -> None:
        while self.edits:
            self.undo()

    def _offer_targets(self) -> None:
        fact, objects = self.picker.chosen_fact, self.picker.chosen.objects
        self._target.options = [name for name in objects if name not in fact.right]
        after = objects[(objects.index(fact.object) + 1) % len(objects)]
        self._target.value = after if after not in fact.right else ""

    def _job(self) -> Job:
        asked, relation, fact = self.settings, self.picker.chosen, self.picker.chosen_fact
        number, compare, on_top = self.picker.number, bool(self._compare.value), bool(self._on_top.value)
        method, how = asked["method"], {key: asked[key] for key in ("template", "layer")}
        more = self._settings.get(method, {})

        def find(progress: ProgressCallback) -> _Found:
            self._enter(f"Looking for the {method} edit", progress)
            made = edit(self.model, fact, asked["target"], method, progress=progress, **how, **more)
            self._enter("Listening to the model", progress)
            said = _said(self.model, made, relation, number, self.edits if on_top else ())
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
            replaced = () if on_top else self.edits
            for one in reversed(replaced):
                one.undo()
            try:
                found = find(progress)
                found.made.apply()
            except BaseException:
                for one in replaced:
                    one.apply()
                raise
            self.edits = (*(self.edits if on_top else ()), found.made)
            self._show_result(found)  # here: what is in the weights is shown, also after a cancel

        return job

    def _take(self, result: _Found) -> dict[str, str]:
        self.said, self.comparison = result.said, result.comparison
        if result.note:
            self._say("kc-note", f"Circuits were not compared. {result.note}")
        earlier = "; ".join(_change(one) for one in reversed(self.edits[:-1]))
        self._tell_state(result.made, f"In the weights now{f', on top of {earlier}' if earlier else ''}.")
        circuits = None if result.comparison is None else result.comparison.circuits
        self._draw_two("Circuits", circuits and {words: circuits[name] for name, words in _CIRCUITS.items()})
        drawn = dict.fromkeys(self.pages, tables.muted("Circuits were not compared."))
        drawn |= {} if result.comparison is None else _compared(result.comparison)
        return drawn | {
            "What it says": tables.table(result.said),
            "Optimisation": tables.table(result.made.losses, scroll=True),
        }

    def _tell_state(self, made: Edit, state: str) -> None:
        first, last = made.layers[0], made.layers[-1]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        how = f"{made.method}, {where}, {made.seconds:.1f} s, loss of the new object {made.nll:.2f} nats"
        self._summarise(f"{_change(made)} ({how}). {state}")


class _Busy(Exception):
    """Another thread has the model."""


def _change(made: Edit) -> str:
    """What an edit changed, in few words."""
    fact = made.facts[0]
    return f"{brief(fact.subject, 40)}: {brief(fact.object, 40)} → {brief(made.targets[0], 40)}"


def _refuse_to_wait(done: int, total: int, note: str) -> None:
    raise _Busy


def _compared(found: EditComparison) -> dict[str, str]:
    lenses = [
        picture(plot_lens(part, title=f"{state} the edit"), f"Logit lens of old and new object, {state}")
        for state, part in found.lens.groupby("state", sort=False)
    ]
    p = "Too few heads are left to draw from." if math.isnan(found.p) else f"p = {found.p:.3f}."
    words = (
        "TE: the share of the edit's effect that goes when these outputs are put back to what they were; for random "
        "heads the mean and 95% of the draws. "
    )
    return {
        "Lens": "".join(lenses),
        "Circuits": tables.table(found.overlap.reset_index()),
        "Which way": tables.table(found.transport) + tables.muted(words + p),
        "Roles": tables.table(found.roles, scroll=True),
    }


def _said(model: Model, made: Edit, relation: Relation, number: int, earlier: Sequence[Edit]) -> pd.DataFrame:
    """Continuations before and after: the prompt, its paraphrases, other subjects, and the prompts of earlier edits."""
    fact, target, templates = made.facts[0], made.targets[0], relation.prompt_templates_zs
    others = [one for one in relation.facts if one.subject != fact.subject]
    near = sorted(others, key=lambda one: one.object != fact.object)[:_NEIGHBOURS]
    asked = [("edited", templates[number].replace("{}", fact.subject), target)]
    asked += [("other words", t.replace("{}", fact.subject), target) for i, t in enumerate(templates) if i != number]
    asked += [("other subject", templates[number].replace("{}", one.subject), "") for one in near]
    asked += [
        ("earlier edit", one.templates[0].replace("{}", one.facts[0].subject), one.targets[0])
        for one in reversed(earlier)
    ]
    table = pd.DataFrame(asked, columns=["asked", "prompt", "target"])
    table["before"] = continuations(model, table["prompt"].tolist(), _TOKENS)
    with made:
        table["after"] = continuations(model, table["prompt"].tolist(), _TOKENS)
    said = [says(text, wanted)[1] for text, wanted in zip(table["after"], table["target"], strict=True)]
    return table.assign(**{"says it": np.where(table["target"] == "", "", np.where(said, "yes", "no"))})
