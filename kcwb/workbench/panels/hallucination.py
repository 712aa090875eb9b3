"""Ask a model for one fact with widgets, and look at why its answer is right or wrong.

What is shown comes from `kcwb.diagnose` and is kept in `HallucinationPanel.diagnosis`, so that a notebook can go on
with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as W
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kcwb.errors import SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.reading.trajectories import WHERE, WHO
from kcwb.studies.hallucination.diagnosis import Diagnosis, diagnose
from kcwb.tasks.prompts import KNOWN_RANK
from kcwb.tasks.relations import Fact, Relation, load_relation, relation_files
from kcwb.workbench import tables
from kcwb.workbench.panels.base import ROW, Panel, brief, button, dropdown, picture, room
from kcwb.workbench.plots import Plot, plain

_COLOURS = ("#0072b2", "#d55e00")  # the right answer, its rival
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e6ea"}
_MOST_HEADS = 12


def plot_diagnosis(found: Diagnosis) -> Plot:
    """Draw a diagnosis: the ranks of right answer and rival at END and at the subject, and what movers write.

    Ranks are on a logarithmic axis, the best at the top; the dashed line is rank 10.
    """
    rival = "runner-up" if found.right else "the model says"
    words = (f"right answer: {plain(found.gold.strip(), 24)}", f"{rival}: {plain(found.rival.strip(), 24)}")
    names = dict(zip(WHO, words, strict=True))
    palette = dict(zip(words, _COLOURS, strict=True))
    with sns.axes_style("white", _STYLE):
        figure = Plot(figsize=(11, 3.7), layout="constrained")
        end, subject, movers = figure.subplots(1, 3)
    ranks = found.lens[found.lens["quantity"] == "rank"].assign(who=lambda table: table["who"].map(names))
    for axes, where in ((end, WHERE[0]), (subject, WHERE[2])):
        _draw_ranks(axes, ranks[ranks["where"] == where], palette)
        axes.set_title(f"logit lens, {where}", fontsize=10)
    subject.sharey(end)
    _draw_movers(movers, found, words, palette)
    handles, labels = end.get_legend_handles_labels()
    place: Any = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=2, frameon=False, fontsize=9)
    figure.suptitle(plain(found.prompt, 90), fontsize=11)
    return figure


def _draw_ranks(axes: Axes, table: pd.DataFrame, palette: Mapping[str, str]) -> None:
    for who, colour in palette.items():
        curve = table[table["who"] == who]
        sns.lineplot(x=curve["layer"], y=curve["value"], color=colour, label=who, errorbar=None, legend=False, ax=axes)
    axes.axhline(KNOWN_RANK, color="#656d76", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="after layer", ylabel="rank")


def _draw_movers(axes: Axes, found: Diagnosis, words: tuple[str, str], palette: Mapping[str, str]) -> None:
    some = found.movers.head(_MOST_HEADS)
    axes.set_title("what movers write", fontsize=10)
    if some.empty:
        return
    long = pd.concat([pd.DataFrame({"node": some["node"], "logits": some[k], "who": w}) for k, w in _pair(words)])
    sns.barplot(long, x="logits", y="node", hue="who", palette=dict(palette), saturation=1, legend=False, ax=axes)
    axes.axvline(0, color="#656d76", linewidth=0.8)
    axes.set(xlabel="logits, direct", ylabel="")
    axes.grid(axis="y", visible=False)


def _pair(words: tuple[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("gold", words[0]), ("rival", words[1])


class HallucinationPanel(Panel):
    """Choose a relation, a fact and a template; see where the answer comes from, and why it is wrong.

    Parameters
    ----------
    model
        The model.
    relation
        What to start with: the name of a packaged relation, a file's path, or a Relation.
    subject
        The fact; default: the relation's first.
    template
        The index of one of the relation's zero-shot templates.
    movers, n, seed
        As in `kcwb.studies.hallucination.diagnosis.diagnose`.

    Attributes
    ----------
    diagnosis
        What is on screen; None before the first.

    Raises
    ------
    DataError, SettingError
        If the relation cannot be read, has no such fact or template, or a number cannot be meant.

    Examples
    --------
    >>> panel = HallucinationPanel(model, "country_currency", subject="Malaysia")  # doctest: +SKIP
    >>> panel.run(); panel.wait(); print(panel.diagnosis.words)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        relation: Relation | str = "country_capital",
        *,
        subject: str | None = None,
        template: int = 0,
        movers: int = 10,
        n: int = 8,
        seed: int = 0,
    ) -> None:
        most = model.graph.n_layers * model.graph.n_heads
        if not 1 <= movers <= most or n < 1:
            raise SettingError(f"movers={movers}, n={n}: 1 to {most} heads, and at least one other fact, are needed.")
        given = relation if isinstance(relation, Relation) else load_relation(relation)
        given.template(template)
        row = _row(given, subject)
        super().__init__()
        self.model = model
        self.diagnosis: Diagnosis | None = None
        self._n, self._seed = n, seed
        self._relations: dict[str, Any] = {**relation_files(), given.name: given}
        names = sorted(self._relations)
        self._relation = dropdown("Relation", [(brief(name), name) for name in names], given.name)
        self._template = dropdown("Template", _templates(given), template, wide=True)
        self._fact = dropdown("Fact", _facts(given), row, wide=True)
        self._movers = W.BoundedIntText(movers, min=1, max=most, description="Movers", layout=room(120))
        self._run_button = button("Diagnose", "search", width=112, button_style="primary")
        self._result = W.HTML(layout=W.Layout(width="100%"))
        self._relation.observe(self._guarded(lambda _: self._offer_facts()), "value")
        self._run_button.on_click(self._guarded(lambda _: self.run()))
        rows = [
            [self._relation, self._template],
            [self._fact, self._movers],
            [self._run_button, *self._progress],
        ]
        self._assemble(*(W.HBox(row, layout=ROW) for row in rows), self._message, self._result)

    # --- in a script ---

    @property
    def settings(self) -> dict[str, Any]:
        """What Diagnose would look at."""
        relation, fact = self._source(), self._chosen()
        return {
            "relation": relation.name,
            "template": relation.prompt_templates_zs[int(self._template.value or 0)],
            "subject": fact.subject,
            "object": fact.object,
            "movers": self._movers.value,
        }

    def run(self) -> None:
        """Diagnose the fact on screen; returns at once, see `wait`. What was there before stays until it is done."""
        self._message.value = ""
        relation, fact, template = self._source(), self._chosen(), int(self._template.value or 0)
        movers = self._movers.value

        def job(progress: ProgressCallback) -> tuple[Diagnosis, str]:
            self._enter(f"Asking {self.model.name}", progress)
            more: dict[str, Any] = {"movers": movers, "n": self._n, "seed": self._seed, "progress": progress}
            found = diagnose(self.model, relation, fact, template=template, **more)
            return found, _drawn(found)

        self._start("diagnose", job, self._show)

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        if self.diagnosis is None:
            return tables.styled(tables.heading("Settings"), tables.pairs(self.settings), self._message.value)
        return tables.styled(self._message.value, self._result.value)

    # --- private ---

    def _source(self) -> Relation:
        found = self._relations[str(self._relation.value)]
        return found if isinstance(found, Relation) else load_relation(found)

    def _chosen(self) -> Fact:
        return self._source().facts[int(self._fact.value or 0)]

    def _offer_facts(self) -> None:
        relation = self._source()
        with self._silently():
            self._template.options, self._template.value = _templates(relation), 0
            self._fact.options, self._fact.value = _facts(relation), 0

    def _show(self, found: tuple[Diagnosis, str]) -> None:
        with self._lock:
            self.diagnosis, self._result.value = found


def _drawn(found: Diagnosis) -> str:
    """A diagnosis as HTML: the picture, the words, and the tables."""
    verdict = "right" if found.right else f"wrong: a failure of {found.failure}"
    line = f"{found.prompt} … {found.gold if found.right else found.rival} ({verdict}; {found.fact.object})"
    movers = found.movers.drop(columns=["layer", "head", "mover"])
    answers = found.answers.astype(object).where(found.answers.notna(), None)
    words = "".join(f"<p>{tables.text(part, 2000)}</p>" for part in found.words.splitlines())
    return tables.styled(
        f'<div class="kc-summary">{tables.text(line, 400)}</div>',
        picture(plot_diagnosis(found), f"Ranks of right answer and rival by layer, and what movers write: {line}"),
        words,
        tables.heading("Who decides (logits above the mean)"),
        tables.table(found.balance),
        tables.heading("Movers"),
        tables.table(movers, scroll=True),
        tables.heading("Heads that speak most for the rival"),
        tables.table(found.heads.head(_MOST_HEADS).drop(columns=["layer", "head"]), scroll=True),
        tables.heading("When"),
        tables.table(answers, scroll=True),
    )


def _templates(relation: Relation) -> list[tuple[str, int]]:
    return [(brief(text), i) for i, text in enumerate(relation.prompt_templates_zs)]


def _facts(relation: Relation) -> list[tuple[str, int]]:
    return [(brief(f"{fact.subject} → {fact.object}"), i) for i, fact in enumerate(relation.facts)]


def _row(relation: Relation, subject: str | None) -> int:
    subjects = [fact.subject for fact in relation.facts]
    return 0 if subject is None else subjects.index(choose(f"The subject in {relation.name}", subject, subjects))
