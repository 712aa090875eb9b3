"""Learning in context with widgets: choose a relation and a number of shots, see which heads are new and needed.

What the panel shows comes from `kcwb.studies.in_context`, and is kept in attributes, so that a notebook can go on
with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import ipywidgets as W
import pandas as pd

from kcwb.errors import SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.studies.in_context.ablation import ARMS
from kcwb.studies.in_context.study import InContext, in_context
from kcwb.tasks.relations import Relation
from kcwb.tasks.shots import KINDS, label_of
from kcwb.workbench import tables
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.picker import Picker
from kcwb.workbench.panels.runner import Job
from kcwb.workbench.panels.widgets import button, check_edges, dropdown, room
from kcwb.workbench.plots import Plot, picture, plot_bars

_MOST_SHOTS = 16
_READS = ("object", "subject", "separator", "words", "first", "question")


class ContextPanel(Panel):
    """Choose a relation, how many shots, and what stands before the question; see what the demonstrations change.

    Parameters
    ----------
    model, relation
        As in `Panel` and `Picker`.
    k, kind
        How many demonstrations, and which context is studied: `shots`, `shuffled` or `unrelated`.
    controls
        Whether the accuracy after both other contexts is told, too.
    edges, n, n_test, template, sets, steps, resamples, draws, seed, unrelated
        As in `kcwb.studies.in_context.in_context`.

    Attributes
    ----------
    found
        The latest InContext; None before the first.

    Examples
    --------
    >>> panel = ContextPanel(model, "country_capital", k=3)  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.found.ablation  # doctest: +SKIP
    """

    pages = ("Accuracy", "Heads", "Without them", "What they read", "Circuits")
    graphs: ClassVar = {"Circuits": 480}

    def __init__(
        self,
        model: Model,
        relation: Relation | str = "country_capital",
        *,
        k: int = 3,
        kind: str = "shots",
        controls: bool = True,
        edges: int = 300,
        n: int = 8,
        n_test: int = 16,
        template: int = 0,
        sets: int = 2,
        steps: int = 5,
        resamples: int = 100,
        draws: int = 100,
        seed: int = 0,
        unrelated: Sequence[Relation] | None = None,
    ) -> None:
        choose("The kind of context", kind, KINDS)
        if not 1 <= k <= _MOST_SHOTS:
            raise SettingError(f"k={k}: the panel shows 1 to {_MOST_SHOTS} demonstrations.")
        check_edges(model, edges=edges)
        super().__init__(model, button("Compare", "play", width=110, button_style="primary"))
        self.found: InContext | None = None
        self._more: dict[str, Any] = {"n": n, "n_test": n_test, "sets": sets, "steps": steps, "resamples": resamples}
        self._more |= {"draws": draws, "template": template, "seed": seed, "unrelated": unrelated}
        self.picker = Picker(self, relation, template=None)
        self._k = W.IntSlider(k, min=1, max=_MOST_SHOTS, description="Shots", continuous_update=False, layout=room(240))
        self._kind = dropdown("Context", list(KINDS), kind)
        self._edges = W.BoundedIntText(edges, min=1, max=model.graph.n_edges, description="Edges", layout=room(160))
        self._controls = W.Checkbox(controls, description="Accuracy of controls", indent=False, layout=room(170))
        self._lay_out([self.picker.relation, self._kind], [self._k, self._edges, self._controls])

    @property
    def settings(self) -> dict[str, Any]:
        """What Compare would do, as parameters of `in_context`."""
        k, kind = int(self._k.value), str(self._kind.value)
        beside = [(k, other) for other in KINDS if other != kind] if self._controls.value else []
        asked = {"relation": self.picker.relation.value, "k": k, "kind": kind, "beside": beside}
        return {**asked, "edges": self._edges.value, **self._more}

    def _told_settings(self) -> dict[str, Any]:
        return {key: self.settings[key] for key in ("relation", "k", "kind", "edges")}

    def _job(self) -> Job:
        settings = self.settings
        name = settings.pop("relation")

        def job(progress: ProgressCallback) -> InContext:
            relation = self.picker.read(name)
            self._enter(f"{relation.name}, {settings['k']} {settings['kind']}", progress)
            return in_context(self.model, relation, progress=progress, **settings)

        return job

    def _take(self, result: InContext) -> dict[str, str]:
        self.found = result
        self._summarise(summary(result))
        self._draw_two("Circuits", {name: one.circuit for name, one in result.circuits.items()})
        return {
            "Accuracy": _accuracy(result),
            "Heads": _heads(result),
            "Without them": _without(result),
            "What they read": _reads(result),
            "Circuits": tables.muted("What both contexts' circuits have, and what either has alone."),
        }


def summary(found: InContext) -> str:
    """The result in a sentence or two."""
    before, after = found.circuits
    task = next(task for task in found.tasks.values() if task.label == after)
    new, shared = found.named("new"), found.named("shared")
    words = f"{task.relation.name}: {len(new)} new and {len(shared)} shared heads with {after}, beside {before}."
    if not new:
        return words
    hits = found.ablation.set_index("arm")["hit_1"].map("{:.2f}".format).to_dict()
    random = hits.get("random heads")  # None where too few others are left
    return (
        f"{words} Hit@1 on {len(task.test)} facts of D_test is {hits['intact']}, without the new heads "
        f"{hits['new heads']}{f', without random ones of the same layers {random}' if random else ''}."
    )


def accuracy_plot(accuracy: pd.DataFrame, title: str | None = None) -> Plot:
    """Bars of a table of `shot_accuracy`: Hit@1 and Hit@10 after each context."""
    ten = {"hit_1": accuracy["hit_10"], "low": accuracy["low_10"], "high": accuracy["high_10"], "metric": "Hit@10"}
    both = pd.concat([accuracy.assign(**ten), accuracy.assign(metric="Hit@1")], ignore_index=True)
    both["context"] = [label_of(k, kind) for k, kind in zip(both["k"], both["kind"], strict=True)]
    return plot_bars(both, "context", "hit_1", hue="metric", label="share of D_test", title=title)


def ablation_plot(table: pd.DataFrame, title: str | None = None) -> Plot:
    """Bars of a table of `ablate_new`: Hit@1 of the intact model and without heads."""
    short = table.assign(arm=table["arm"].str.removesuffix(" heads"))
    return plot_bars(short, "arm", "hit_1", label="Hit@1, D_test", title=title)


def _accuracy(found: InContext) -> str:
    words = "Answers of D_test after each context, with the 95% Wilson intervals of these shares of facts."
    return (
        picture(accuracy_plot(found.accuracy), "Hit@1 and Hit@10 after each context")
        + tables.table(found.accuracy)
        + tables.muted(words)
    )


def _heads(found: InContext) -> str:
    parts = []
    for kind, words in (("head", "Attention heads"), ("mlp", "MLPs")):
        some = found.nodes[found.nodes["kind"] == kind].drop(columns=["kind", "layer", "head"])
        parts += [tables.heading(words), tables.table(some, scroll=True)]
    words = (
        "in_before, in_after: the share of resamples of the facts in whose circuit a node is, without and with the "
        "context; new, both, lost: in which it is in the later alone, in both, in the earlier alone."
    )
    return "".join(parts) + tables.muted(words)


def _without(found: InContext) -> str:
    table = found.ablation
    order = [arm for arm in ARMS if arm in set(table["arm"])]
    table = table.set_index("arm").loc[order].reset_index()
    drawn = picture(ablation_plot(table), "Hit@1 without new, random, shared heads")
    words = (
        "Outputs of the heads set to zero at every position. Random heads: mean over the draws. p: the share of draws, "
        "the new heads counted in, that do at least as much harm."
    )
    return drawn + tables.table(table) + tables.muted(words)


def _reads(found: InContext) -> str:
    if found.reading.empty:
        return tables.muted("No head is new, so there is nothing to compare.")
    some = found.reading[found.reading["quantity"].isin(_READS)]
    bars = some.melt("quantity", ["new heads", "other heads", "random heads"], var_name="heads", value_name="attention")
    bars = bars.assign(low=float("nan"), high=float("nan"))
    drawn = picture(plot_bars(bars, "quantity", "attention", hue="heads"), "END's attention to parts of the prompt")
    new = found.heads[found.heads["status"] == "new"].drop(columns=["layer", "head", "status"])
    words = "END's attention, mean over facts and heads; low to high: 95% of the random sets. Then each new head."
    return drawn + tables.table(found.reading) + tables.muted(words) + tables.table(new, scroll=True)
