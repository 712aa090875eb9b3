"""Two hops with widgets: choose two relations, see what the model answers, where the bridge is, what circuits share.

What it shows comes from `kcwb.tasks.hops` and `kcwb.studies.two_hop`, and is kept in attributes, so that a notebook can
go on with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import ipywidgets as W
import pandas as pd

from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.studies.two_hop.circuits import HopCircuits, hop_circuits
from kcwb.studies.two_hop.deletion import delete_first_hop
from kcwb.studies.two_hop.lens import PLACES, hop_arrival, hop_lens, lens_summary
from kcwb.studies.two_hop.overlap import hop_overlap
from kcwb.tasks.compose import Composition
from kcwb.tasks.hops import ASKED, HopAnswers, Hops, ask_hops, funnel, make_hops
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import make_task
from kcwb.workbench import tables
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.picker import ChainPicker
from kcwb.workbench.panels.runner import Job
from kcwb.workbench.panels.widgets import button, dropdown, numbered, offer, room
from kcwb.workbench.plots import picture, plot_bars, plot_lens

_RIGHT = [("rank 1", 1), ("rank 10 or better", 10)]
_SHORTCUTS = [("dropped at rank 1", 1), ("dropped at rank 10 or better", 10), ("kept", 0)]
_OVERLAP = ["level", "circuit", "part", "share", "low", "high", "random", "p", "jaccard", "random_jaccard"]


@dataclass(frozen=True)
class _Found:
    answers: HopAnswers
    funnel: pd.DataFrame
    hops: Hops | None = None
    lens: pd.DataFrame | None = None
    circuits: HopCircuits | None = None
    overlap: pd.DataFrame | None = None
    deletion: pd.DataFrame | None = None
    note: str = ""


class HopPanel(Panel):
    """Choose two relations; see how many chains are left, one of them, the bridge, and the circuits.

    Parameters
    ----------
    model
        The model.
    first, second
        What to start with: names of packaged relations, Relations, or for `first` a Composition (then `second` is not
        read).
    template
        Which wording of the two-hop question.
    k, shortcut_k
        As in `kcwb.tasks.hops.make_hops`: 1 or 10; `shortcut_k` may be None.
    circuits
        Whether circuits are found and compared, too, which takes minutes.
    controls
        Relations that have nothing to do with either, whose circuits are compared as well.
    edges, n, draws, resamples, seed
        As in `kcwb.studies.two_hop.circuits`; `n` chains are studied.

    Attributes
    ----------
    answers
        What the model answers of every chain (HopAnswers).
    hops
        The chains that are studied; None where none is left.
    lens, circuits, overlap, deletion
        The table of `hop_lens`, the HopCircuits, and the tables of `hop_overlap` and `delete_first_hop`; None where
        they were not asked for.

    Examples
    --------
    >>> panel = HopPanel(model, "landmark_country", "country_capital", k=10)  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.overlap  # doctest: +SKIP
    """

    pages = ("Funnel", "Case", "Bridge", "Overlap", "Without the first hop")
    graphs: ClassVar = {"Overlap": 420}

    def __init__(
        self,
        model: Model,
        first: Relation | Composition | str = "landmark_country",
        second: Relation | str = "country_capital",
        *,
        template: int = 0,
        k: int = 1,
        shortcut_k: int | None = 1,
        circuits: bool = True,
        controls: Sequence[str] = ("antonym",),
        edges: int = 300,
        n: int = 8,
        draws: int = 20,
        resamples: int = 50,
        seed: int = 0,
    ) -> None:
        for name, value, known in (("k", k, _RIGHT), ("shortcut_k", shortcut_k or 0, _SHORTCUTS)):
            if value not in [number for _, number in known]:
                raise SettingError(f"{name}={value}: the panel takes {', '.join(str(number) for _, number in known)}.")
        super().__init__(model, button("Ask", "play", button_style="primary"))
        self.answers: HopAnswers | None = None
        self.hops: Hops | None = None
        self.lens: pd.DataFrame | None = None
        self.circuits: HopCircuits | None = None
        self.overlap: pd.DataFrame | None = None
        self.deletion: pd.DataFrame | None = None
        self._controls, self._edges, self._n = tuple(controls), edges, n
        self._draws, self._resamples, self._seed = draws, resamples, seed
        self.picker = picker = ChainPicker(self, first, second, template=template)
        self._k = dropdown("Right is", _RIGHT, k)
        self._shortcuts = dropdown("Shortcuts", _SHORTCUTS, shortcut_k or 0)
        self._compare = W.Checkbox(circuits, description="Compare circuits", indent=False, layout=room(150))
        self._case = dropdown("Case", [], None, least=400)
        self._on(self._case, lambda _: self._fill({"Case": self._case_page()}))
        choices = [self._k, self._shortcuts, self._compare]
        self._lay_out([picker.first, picker.second, picker.template], choices, below=([self._case],))

    @property
    def settings(self) -> dict[str, Any]:
        """What Ask would do."""
        return {
            "first": self.picker.first.value,
            "second": self.picker.second.value,
            "question": self.picker.chosen.wordings[self.picker.number].template,
            "k": self._k.value,
            "shortcut_k": self._shortcuts.value or None,
            "n": self._n,
            "circuits": self._compare.value,
        }

    def select(self, subject: str) -> None:
        """Look at the chain of a subject.

        Raises
        ------
        SettingError
            If it is not among those that are studied.
        """
        subjects = [] if self.hops is None else self.hops.chains["subject"].tolist()
        if subject not in subjects:
            raise SettingError(
                f"{subject!r:.60} is not among the chains that are studied: {', '.join(subjects)[:300]}."
            )
        self._case.value = subjects.index(subject)

    # --- work; on the worker ---

    def _job(self) -> Job:
        composition, template, compare = self.picker.chosen, self.picker.number, self._compare.value
        filters: dict[str, Any] = {"k": self._k.value, "shortcut_k": self._shortcuts.value or None}

        def job(progress: ProgressCallback) -> _Found:
            self._enter("Asking about every chain", progress)
            answers = ask_hops(self.model, composition, template=template, seed=self._seed, progress=progress)
            left = funnel(answers.ranks, **filters)
            try:
                hops = make_hops(answers, **filters, n=self._n, seed=self._seed)
            except DataError as error:  # that nothing is left is a result
                return _Found(answers, left, note=str(error))
            self._enter("Looking for the bridge", progress)
            try:
                found = _Found(answers, left, hops, hop_lens(self.model, hops, progress=progress))
            except DataError as error:  # first tokens that tell nothing apart; the rest can be looked at
                found = _Found(answers, left, hops, note=str(error))
            return self._study(found, hops, progress) if compare else found

        return job

    def _study(self, found: _Found, hops: Hops, progress: ProgressCallback) -> _Found:
        self._enter("Asking for the facts of other relations", progress)
        tasks = [make_task(self.model, name, self._n, self._seed, progress=progress) for name in self._controls]
        controls = dict(zip(self._controls, tasks, strict=True))
        self._enter("Finding circuits", progress)
        circuits = hop_circuits(self.model, hops, controls=controls, edges=self._edges, progress=progress)
        self._enter("Comparing them with random ones", progress)
        more: dict[str, Any] = {"draws": self._draws, "seed": self._seed, "progress": progress}
        overlap = hop_overlap(circuits, resamples=self._resamples, **more)
        self._enter("Deleting the first hop", progress)
        try:
            deletion, note = delete_first_hop(self.model, circuits, **more), ""
        except DataError as error:  # the circuits are good, whatever cannot be cut
            deletion, note = None, str(error)
        return replace(found, circuits=circuits, overlap=overlap, deletion=deletion, note=note)

    # --- drawing ---

    def _take(self, result: _Found) -> dict[str, str]:
        self.answers, self.hops, self.lens = result.answers, result.hops, result.lens
        self.circuits, self.overlap, self.deletion = result.circuits, result.overlap, result.deletion
        if result.note:
            self._say("kc-note", result.note)
        chains = [] if result.hops is None else list(result.hops.chains.itertuples(index=False))
        with self._silently():
            offer(self._case, numbered(f"{one.subject} → {one.bridge} → {one.object}" for one in chains))
        self._summarise(_summary(result))
        shown = None if result.circuits is None or result.overlap is None else result.circuits.circuits
        self._draw_two("Overlap", shown and {name: shown[name] for name in ("two-hop", "integrated")})
        bridge = {"Funnel": _funnel_page(result), "Case": self._case_page(), "Bridge": self._bridge_page()}
        return bridge | _circuit_pages(result)

    def _case_page(self) -> str:
        if self.hops is None or self.answers is None or self._case.value is None:
            return tables.muted("No chain is left.")
        chain = self.hops.chains.iloc[int(self._case.value)]
        ranks = self.hops.ranks
        row = int(ranks.index[ranks["subject"] == chain["subject"]][0])
        asked = {name: self.answers.asked[name] for name in ASKED}
        said = pd.DataFrame(
            {
                "asked": list(ASKED),
                "prompt": [one.prompts.texts[one.of_chain[row]] for one in asked.values()],
                "answer": [one.prompts.facts[one.of_chain[row]].object for one in asked.values()],
                "the model's rank of it": [int(ranks[name][row]) for name in ASKED],
            }
        )
        curves = ""
        if self.lens is not None:
            some = self.lens[self.lens["subject"] == chain["subject"]].rename(columns={"rank": "value"})
            some = some.assign(quantity="rank", low=math.nan, high=math.nan)
            curves = _lenses(some, f"{chain['subject']}, read at: ", "Lens at")
        return tables.table(said) + curves

    def _bridge_page(self) -> str:
        if self.lens is None:
            words = "No chain is left." if self.hops is None else "Objects or bridges begin alike: see above."
            return tables.muted(words)
        drawn = _lenses(lens_summary(self.lens, self._seed), "read at: ", "Lens of the bridge at")
        return drawn + tables.table(hop_arrival(self.lens), scroll=True)


def _summary(found: _Found) -> str:
    chained, hops = found.answers.composition, found.hops
    names = f"{chained.first.name}, then {chained.second.name}"
    if hops is None:
        return f"{names}: {len(chained.chains)} chains, of which none is left"
    kept = f"{int(hops.ranks['kept'].sum())} of {len(hops.ranks)} chains are left, {len(hops.chains)} of them in D_val"
    return f"{names}: {kept}. Right means rank {hops.k} or better."


def _lenses(table: pd.DataFrame, title: str, words: str) -> str:
    """The curves of each place at which the lens reads."""
    parts = {place: part for place in PLACES if len(part := table[table["place"] == place])}
    return "".join(
        picture(plot_lens(part, ["rank"], title=f"{title}{place}"), f"{words} {place}") for place, part in parts.items()
    )


def _funnel_page(found: _Found) -> str:
    counts = ", ".join(f"{name}: {count}" for name, count in found.answers.composition.counts.items())
    return tables.table(found.funnel) + tables.muted(
        "A filter is applied to what the one above leaves. Entity alone: the second relation about the subject itself; "
        f"relation alone: the two-hop question without its subject. Before all of these: {counts}"
    )


def _circuit_pages(found: _Found) -> dict[str, str]:
    if found.circuits is None or found.overlap is None:
        return dict.fromkeys(("Overlap", "Without the first hop"), tables.muted("Circuits were not compared."))
    one = found.overlap[found.overlap["level"] == "one fact"]
    bars = plot_bars(one, "circuit", "share", column="part", label="share in the two-hop circuit")
    overlap = [
        picture(bars, "Share of each circuit that the two-hop circuit has"),
        tables.table(found.overlap[[*_OVERLAP, "size_two_hop", "size"]], scroll=True),
        tables.muted(
            "Integrated: the union of the two hops' circuits. One fact: circuits of one chain at a time, mean over "
            "chains with its 95% bootstrap interval. The control has nothing to do with either hop: what it shares "
            "is shared by all."
        ),
    ]
    deletion = tables.muted("Nothing could be cut.")
    if found.deletion is not None:
        deletion = tables.table(found.deletion) + tables.muted(
            "What one circuit has and the other has not is cut out of the whole model. Cost: the increase of the "
            "answer's loss, nats; p: the share of random sets of edges that cost as much."
        )
    return {"Overlap": "".join(overlap), "Without the first hop": deletion}
