"""Ask a model for one fact with widgets, and look at why its answer is right or wrong.

What is shown comes from `kcwb.diagnose` and is kept in `HallucinationPanel.diagnosis`, so that a notebook can go on
with it.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as W
import seaborn as sns
from matplotlib.lines import Line2D

from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.reading.trajectories import WHERE, WHO
from kcwb.studies.hallucination.diagnosis import FEWEST_FACTS, Diagnosis, diagnose
from kcwb.tasks.prompts import KNOWN_RANK
from kcwb.tasks.relations import Relation
from kcwb.workbench import tables
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.picker import Picker
from kcwb.workbench.panels.runner import Job
from kcwb.workbench.panels.widgets import button, room
from kcwb.workbench.plots import MUTED, Plot, draw_curves, finish, panes, picture, plain

_COLOURS = ("#0072b2", "#d55e00")  # the right answer, its rival
_MOST_HEADS = 12


def plot_diagnosis(found: Diagnosis) -> Plot:
    """Draw a diagnosis: the ranks of right answer and rival at END and at the subject, and what movers write.

    Ranks are on a logarithmic axis, the best at the top; the dashed line is rank 10.
    """
    rival = "runner-up" if found.right else "the model says"
    words = (f"right answer: {plain(found.gold.strip(), 24)}", f"{rival}: {plain(found.rival.strip(), 24)}")
    palette = dict(zip(words, _COLOURS, strict=True))
    figure, (end, subject, movers) = panes(3, 11 / 3, 3.7, sharey=False)
    ranks = found.lens[found.lens["quantity"] == "rank"].assign(low=float("nan"), high=float("nan"))
    ranks["who"] = ranks["who"].map(dict(zip(WHO, words, strict=True)))
    for axes, where in ((end, WHERE[0]), (subject, WHERE[2])):
        draw_curves(axes, ranks[ranks["where"] == where], "rank", palette)
        axes.set_ylabel("rank")
        axes.axhline(KNOWN_RANK, color=MUTED, linewidth=0.8, linestyle="--")
        axes.set_title(f"logit lens, {where}", fontsize=10)
    subject.sharey(end)
    movers.set_title("what movers write", fontsize=10)
    some = found.movers.head(_MOST_HEADS)
    if len(some):
        named = some[["node", "gold", "rival"]].set_axis(["node", *words], axis=1)
        long = named.melt("node", var_name="who", value_name="logits")
        sns.barplot(long, x="logits", y="node", hue="who", palette=palette, saturation=1, legend=False, ax=movers)
        movers.axvline(0, color=MUTED, linewidth=0.8)
        movers.set(xlabel="logits, direct", ylabel="")
        movers.grid(axis="y", visible=False)
    finish(figure, [Line2D([], [], color=colour, label=who) for who, colour in palette.items()], found.prompt)
    return figure


class HallucinationPanel(Panel):
    """Choose a relation, a fact and a template; see where the answer comes from, and why it is wrong.

    Parameters
    ----------
    model, relation, subject, template
        As in `Panel` and `Picker`.
    movers, n, seed
        As in `kcwb.studies.hallucination.diagnosis.diagnose`.

    Attributes
    ----------
    diagnosis
        What is on screen; None before the first.

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
        if not 1 <= movers <= most or n < FEWEST_FACTS:
            raise SettingError(
                f"movers={movers}, n={n}: 1 to {most} heads, and {FEWEST_FACTS} other facts, are needed."
            )
        super().__init__(model, button("Diagnose", "search", width=112, button_style="primary"))
        self.diagnosis: Diagnosis | None = None
        self._n, self._seed = n, seed
        self.picker = Picker(self, relation, template=template, subject=subject)
        self._movers = W.BoundedIntText(movers, min=1, max=most, description="Movers", layout=room(120))
        self._lay_out([self.picker.relation, self.picker.template], [self.picker.fact, self._movers])

    @property
    def settings(self) -> dict[str, Any]:
        """What Diagnose would look at."""
        return {**self.picker.settings, "movers": self._movers.value}

    def _job(self) -> Job:
        relation, fact, template = self.picker.chosen, self.picker.chosen_fact, self.picker.number
        more: dict[str, Any] = {"movers": self._movers.value, "n": self._n, "seed": self._seed}

        def job(progress: ProgressCallback) -> tuple[Diagnosis, str]:
            self._enter(f"Asking {self.model.name}", progress)
            found = diagnose(self.model, relation, fact, template=template, progress=progress, **more)
            return found, _drawn(found)

        return job

    def _take(self, result: tuple[Diagnosis, str]) -> dict[str, str]:
        self.diagnosis, self._summary.value = result
        return {}


def _drawn(found: Diagnosis) -> str:
    verdict = "right" if found.right else f"wrong: a failure of {found.failure}"
    line = f"{found.prompt} … {found.gold if found.right else found.rival} ({verdict}; {found.fact.object})"
    movers = found.movers.drop(columns=["layer", "head", "mover"])
    answers = found.answers.astype(object).where(found.answers.notna(), None)
    words = "".join(f"<p>{tables.text(part, 2000)}</p>" for part in found.words.splitlines())
    return tables.styled(
        tables.summary(line),
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
