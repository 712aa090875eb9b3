"""Two hops with widgets: choose two relations, see what the model answers, where the bridge is, what circuits share.

What it shows comes from `kcwb.tasks.hops` and `kcwb.studies.two_hop`, and is kept in attributes, so that a notebook can
go on with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.studies.two_hop.circuits import HopCircuits, hop_circuits
from kcwb.studies.two_hop.deletion import delete_first_hop
from kcwb.studies.two_hop.lens import PLACES, hop_arrival, hop_lens, lens_summary
from kcwb.studies.two_hop.overlap import hop_overlap
from kcwb.tasks.compose import Composition, compose, compositions
from kcwb.tasks.hops import ASKED, HopAnswers, Hops, ask_hops, funnel, make_hops
from kcwb.tasks.prompts import make_task
from kcwb.tasks.relations import Relation
from kcwb.workbench import tables
from kcwb.workbench.graph.page import compare_view
from kcwb.workbench.panels.base import ROW, Panel, brief, button, dropdown, picture, room
from kcwb.workbench.plots import plot_bars, plot_lens

_PAGES = ("Funnel", "Case", "Bridge", "Overlap", "Without the first hop")
_RIGHT = [("rank 1", 1), ("rank 10 or better", 10)]
_SHORTCUTS = [("dropped at rank 1", 1), ("dropped at rank 10 or better", 10), ("kept", 0)]


@dataclass(frozen=True)
class _Found:
    """One run."""

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

    Raises
    ------
    DataError, SettingError
        If the relations cannot be read or chained, or a setting is not known.

    Examples
    --------
    >>> panel = HopPanel(model, "landmark_country", "country_capital", k=10)  # doctest: +SKIP
    >>> panel.run(); panel.wait(); panel.overlap  # doctest: +SKIP
    """

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
        given = first if isinstance(first, Composition) else compose(first, second)
        given.wording(template)
        super().__init__()
        self.model = model
        self.answers: HopAnswers | None = None
        self.hops: Hops | None = None
        self.lens: pd.DataFrame | None = None
        self.circuits: HopCircuits | None = None
        self.overlap: pd.DataFrame | None = None
        self.deletion: pd.DataFrame | None = None
        self._controls, self._edges, self._n = tuple(controls), edges, n
        self._draws, self._resamples, self._seed = draws, resamples, seed
        self._given = given
        packaged = compositions(least=1)
        self._pairs = {str(one): list(some) for one, some in packaged.groupby("first", sort=True)["second"]}
        seconds = self._pairs.setdefault(given.first.name, [])
        if given.second.name not in seconds:
            seconds.append(given.second.name)
        self._first = dropdown("First", [(brief(name), name) for name in self._pairs], given.first.name)
        self._second = dropdown("Second", self._seconds(), given.second.name)
        self._template = dropdown("Question", _wordings(given), template, wide=True)
        self._k = dropdown("Right is", _RIGHT, k)
        self._shortcuts = dropdown("Shortcuts", _SHORTCUTS, shortcut_k or 0)
        self._compare = W.Checkbox(circuits, description="Compare circuits", indent=False, layout=room(150))
        self._case = dropdown("Case", [], None, wide=True)
        self._run_button = button("Ask", "play", button_style="primary")
        self._summary = W.HTML()
        self._pages = {name: W.HTML(layout=W.Layout(width="100%")) for name in _PAGES}
        self._connect()
        self._lay_out()

    # --- in a script ---

    @property
    def settings(self) -> dict[str, Any]:
        """What Ask would do."""
        return {
            "first": self._first.value,
            "second": self._second.value,
            "question": self._chosen().wordings[self._number].template,
            "k": self._k.value,
            "shortcut_k": self._shortcuts.value or None,
            "n": self._n,
            "circuits": self._compare.value,
        }

    def run(self) -> None:
        """Ask about the relations on screen, and study what is left; returns at once, see `wait`."""
        self._message.value = ""
        composition, template, compare = self._chosen(), self._number, self._compare.value
        settings: dict[str, Any] = {"k": self._k.value, "shortcut_k": self._shortcuts.value or None}

        def job(progress: ProgressCallback) -> _Found:
            self._enter("Asking about every chain", progress)
            answers = ask_hops(self.model, composition, template=template, seed=self._seed, progress=progress)
            left = funnel(answers.ranks, **settings)
            try:
                hops = make_hops(answers, **settings, n=self._n, seed=self._seed)
            except DataError as error:  # that nothing is left is a finding
                return _Found(answers, left, note=str(error))
            self._enter("Looking for the bridge", progress)
            try:
                found = _Found(answers, left, hops, hop_lens(self.model, hops, progress=progress))
            except DataError as error:  # first tokens that tell nothing apart; the rest can be looked at
                found = _Found(answers, left, hops, note=str(error))
            return self._study(found, progress) if compare else found

        self._start("hops", job, self._show_found)

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

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        if self.answers is None:
            return tables.styled(tables.heading("Settings"), tables.pairs(self.settings), self._message.value)
        pages = [part for name in _PAGES for part in (tables.heading(name), self._pages[name].value)]
        return tables.styled(self._message.value, self._summary.value, *pages)

    # --- making ---

    def _study(self, found: _Found, progress: ProgressCallback) -> _Found:
        assert found.hops is not None  # there are chains to study
        self._enter("Asking for the facts of other relations", progress)
        tasks = [make_task(self.model, name, self._n, self._seed, progress=progress) for name in self._controls]
        controls = dict(zip(self._controls, tasks, strict=True))
        self._enter("Finding circuits", progress)
        circuits = hop_circuits(self.model, found.hops, controls=controls, edges=self._edges, progress=progress)
        self._enter("Comparing them with random ones", progress)
        more: dict[str, Any] = {"draws": self._draws, "seed": self._seed, "progress": progress}
        overlap = hop_overlap(circuits, resamples=self._resamples, **more)
        self._enter("Deleting the first hop", progress)
        try:
            deletion, note = delete_first_hop(self.model, circuits, **more), ""
        except DataError as error:  # the circuits are good, whatever cannot be cut
            deletion, note = None, str(error)
        return replace(found, circuits=circuits, overlap=overlap, deletion=deletion, note=note)

    @property
    def _number(self) -> int:
        return int(self._template.value or 0)

    def _chosen(self) -> Composition:
        first, second = str(self._first.value), str(self._second.value)
        given = self._given
        return given if (first, second) == (given.first.name, given.second.name) else compose(first, second)

    def _seconds(self) -> list[tuple[str, str]]:
        return [(brief(name), name) for name in self._pairs[str(self._first.value)]]

    def _connect(self) -> None:
        self._first.observe(self._guarded(lambda _: self._offer_seconds()), "value")
        self._second.observe(self._guarded(lambda _: self._offer_wordings()), "value")
        self._case.observe(self._guarded(lambda _: self._draw_case()), "value")
        self._run_button.on_click(self._guarded(lambda _: self.run()))

    def _lay_out(self) -> None:
        rows = [
            [self._first, self._second, self._template],
            [self._k, self._shortcuts, self._compare],
            [self._run_button, *self._progress],
        ]
        pages = W.Tab([self._pages[name] for name in _PAGES], titles=_PAGES)
        self._result = W.VBox([self._summary, self._case, pages], layout=W.Layout(display="none"))
        self._assemble(*(W.HBox(row, layout=ROW) for row in rows), self._message, self._result)

    def _offer_seconds(self) -> None:
        with self._silently():
            options = self._seconds()
            self._second.options, self._second.value = options, options[0][1]
            self._offer_wordings()

    def _offer_wordings(self) -> None:
        with self._silently():
            self._template.options, self._template.value = _wordings(self._chosen()), 0

    # --- drawing ---

    def _show_found(self, found: _Found) -> None:
        with self._lock:
            self.answers, self.hops, self.lens = found.answers, found.hops, found.lens
            self.circuits, self.overlap, self.deletion = found.circuits, found.overlap, found.deletion
            if found.note:
                self._say("kc-note", found.note)
            with self._silently():
                chains = [] if found.hops is None else list(found.hops.chains.itertuples(index=False))
                self._case.options = [
                    (brief(f"{one.subject} → {one.bridge} → {one.object}"), i) for i, one in enumerate(chains)
                ]
                self._case.value = 0 if chains else None
            words = repr(found.answers.composition if found.hops is None else found.hops)
            self._summary.value = tables.styled(f'<div class="kc-summary">{tables.text(words, 1000)}</div>')
            self._draw_funnel(found)
            self._draw_case()
            self._draw_bridge()
            self._draw_circuits()
            self._result.layout.display = ""

    def _draw_funnel(self, found: _Found) -> None:
        counts = found.answers.composition.counts
        self._pages["Funnel"].value = tables.styled(
            tables.table(found.funnel),
            tables.muted(
                "A filter is applied to what the one above leaves. Entity alone: the second relation about the subject "
                "itself; relation alone: the two-hop question without its subject. Before all of these: "
                + ", ".join(f"{name}: {count}" for name, count in counts.items())
            ),
        )

    def _draw_case(self) -> None:
        page = self._pages["Case"]
        if self.hops is None or self.answers is None or self._case.value is None:
            page.value = tables.styled(tables.muted("No chain is left."))
            return
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
        curves = []
        if self.lens is not None:
            some = self.lens[self.lens["subject"] == chain["subject"]].rename(columns={"rank": "value"})
            curves = _by_place(some.assign(quantity="rank", low=math.nan, high=math.nan))
        page.value = tables.styled(
            tables.table(said),
            *(
                picture(plot_lens(part, ["rank"], title=f"{chain['subject']}, read at: {place}"), f"Lens at {place}")
                for place, part in curves
            ),
        )

    def _draw_bridge(self) -> None:
        page = self._pages["Bridge"]
        if self.lens is None:
            words = "No chain is left." if self.hops is None else "Objects or bridges begin alike: see above."
            page.value = tables.styled(tables.muted(words))
            return
        summary = lens_summary(self.lens, self._seed)
        page.value = tables.styled(
            *(
                picture(plot_lens(part, ["rank"], title=f"read at: {place}"), f"Lens of the bridge at {place}")
                for place, part in _by_place(summary)
            ),
            tables.table(hop_arrival(self.lens), scroll=True),
        )

    def _draw_circuits(self) -> None:
        if self.circuits is None or self.overlap is None:
            for name in ("Overlap", "Without the first hop"):
                self._pages[name].value = tables.styled(tables.muted("Circuits were not compared."))
            return
        one = self.overlap[self.overlap["level"] == "one fact"]
        shown = self.circuits.circuits
        view = compare_view(shown["two-hop"], shown["integrated"], names=("two-hop", "integrated"), height=420)
        shown_columns = ["level", "circuit", "part", "share", "low", "high", "random", "p", "jaccard", "random_jaccard"]
        self._pages["Overlap"].value = tables.styled(
            picture(
                plot_bars(one, "circuit", "share", column="part", label="share in the two-hop circuit"),
                "Share of each circuit that the two-hop circuit has",
            ),
            tables.table(self.overlap[[*shown_columns, "size_two_hop", "size"]], scroll=True),
            tables.muted(
                "Integrated: the union of the two hops' circuits. One fact: circuits of one chain at a time, mean over "
                "chains with its 95% bootstrap interval. The control has nothing to do with either hop: what it shares "
                "is shared by all."
            ),
            view._repr_html_(),
        )
        self._pages["Without the first hop"].value = (
            tables.styled(tables.muted("Nothing could be cut."))
            if self.deletion is None
            else tables.styled(
                tables.table(self.deletion),
                tables.muted(
                    "What one circuit has and the other has not is cut out of the whole model. Cost: the increase of "
                    "the answer's loss, nats; p: the share of random sets of edges that cost as much."
                ),
            )
        )


def _by_place(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(place, part) for place in PLACES if len(part := table[table["place"] == place])]


def _wordings(composition: Composition) -> list[tuple[str, int]]:
    return [(brief(wording.template), i) for i, wording in enumerate(composition.wordings)]
