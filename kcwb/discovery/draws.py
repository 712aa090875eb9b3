"""What an ensemble leaves to chance, and each of its draws: everything that is decided before anything is computed.

Sources of chance, each with values of its own and drawn independently of the others:

- `facts`: a bootstrap resample of D_val's facts (of each half of them, for the ensembles of halves);
- `template`: one of the relation's wordings, the task's own among them, in which the model knows the facts;
- `setting`: of methods that score, how many edges (or the threshold), from half of what was asked for to twice, and
  whether by signed or absolute score; of others, those that they name as `varied`, on the same grid (ACDC: tau and
  `absolute`);
- `ablation`: what is by chance in it (`AblationKind.drawn_again`): the prompts of a mean, the partners of resampling;
- `order`: in which order the heads of a layer are visited, of methods that take one (ACDC).

Templates and ablations have few values (`levels`), since each combination of the two is a run; all others are free
where a method scores, because the score of some facts is the mean of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import ablation_kind
from kcwb.discovery.registry import Settled, check_size
from kcwb.errors import DataError, SettingError, choose, warn
from kcwb.models.loading import Model
from kcwb.statistics import resample_counts
from kcwb.tasks.task import Task
from kcwb.tasks.variants import in_other_words, with_shuffled_answers

SOURCES = ("facts", "template", "setting", "ablation", "order")
#: What a number is multiplied by when a setting is drawn.
GRID = (0.5, 0.5**0.5, 1.0, 2**0.5, 2.0)
FEWEST_FACTS = 4
_LARGEST_SEED = 2**31


class Condition(NamedTuple):
    """What prompts are run against: a task in some words, and an ablation's text. Draws share conditions."""

    task: Task
    ablation: str


@dataclass(frozen=True)
class Draw:
    """One draw: the condition's number, how often each fact is taken, and the settings that differ."""

    condition: int
    counts: tuple[int, ...]
    settings: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, eq=False)
class Plan:
    """All draws of an ensemble.

    Attributes
    ----------
    conditions
        What draws run on.
    draws
        The independent ones.
    twins
        Source -> the first draws again, with this source alone as in the draw after them.
    facts
        Which facts can be drawn.
    halves
        The same for each half of the facts; empty if they are not made.
    drawn
        What each draw drew, by source, ready for JSON.
    left_out
        Source -> why it was not varied.
    """

    conditions: list[Condition]
    draws: list[Draw]
    twins: dict[str, list[Draw]]
    facts: list[bool]
    halves: list[Plan]
    drawn: dict[str, Any]
    left_out: dict[str, str]

    def all(self) -> list[Draw]:
        """Every draw, also those of twins and halves."""
        mine = [*self.draws, *(draw for some in self.twins.values() for draw in some)]
        return mine + [draw for half in self.halves for draw in half.all()]


def make_plan(
    model: Model,
    task: Task,
    settled: Settled,
    vary: Sequence[str] | None,
    *,
    draws: int,
    twins: int,
    levels: int,
    halves: bool,
    shuffled: bool,
    seed: int,
) -> Plan:
    """Draw an ensemble; `vary=None` is all that can be varied, and anything else an order to.

    Raises
    ------
    SettingError
        If a source is not known, or was asked for and has but one value.
    DataError
        If fewer than four facts are left to draw from.
    """
    for name in vary or ():
        choose("The source of variation", name, SOURCES)
    wanted = SOURCES if vary is None else tuple(dict.fromkeys(vary))
    if not wanted:
        raise SettingError(f"vary=[]: name what is left to chance, some of {', '.join(SOURCES)}.")
    values = _Values(model, task, settled, wanted, levels, seed)
    for name in wanted:
        if name in values.left_out and vary is not None:
            raise SettingError(f"{name} cannot be varied: {values.left_out[name]}.")
    if vary is None and values.refused:  # that there is nothing to vary is no news, but that there could be is
        warn(f"This ensemble does not vary the template: {values.left_out['template']}.")
    return values.plan(draws, twins, halves, shuffled)


class _Values:
    """The values that each source can have."""

    def __init__(
        self, model: Model, task: Task, settled: Settled, wanted: Sequence[str], levels: int, seed: int
    ) -> None:
        self.model, self.settled, self.seed, self.levels = model, settled, seed, levels
        self.left_out: dict[str, str] = {}
        self.refused = False
        tasks, rows = self._templates(task, "template" in wanted)
        self.n_facts = len(rows)
        if self.n_facts < FEWEST_FACTS:
            raise DataError(
                f"An ensemble needs at least {FEWEST_FACTS} facts that the model knows and the ablation is defined on; "
                f"{task.relation.name} in {task.template!r} has {self.n_facts} in D_val. Make the task with a larger n."
            )
        self.cells = [self._ablations(one, rows, "ablation" in wanted) for one in tasks]
        self.settings = self._settings() if "setting" in wanted else [{}]
        if "order" in wanted and "order" not in settled.method.own:
            self.left_out["order"] = f"{settled.method.name} looks at all edges at once, in no order"
        self.wanted = [name for name in wanted if name not in self.left_out]

    def _templates(self, task: Task, wanted: bool) -> tuple[list[Task], list[int]]:
        """The task in each wording, and the rows of D_val that all of them can be asked for."""
        usable = ablation_kind(self.settled.ablation).paired
        tasks, rows, reasons = [task], _asked(task, range(len(task.val)), usable), []
        others = [text for text in task.relation.prompt_templates_zs if text != task.template]
        for text in others if wanted else ():
            if len(tasks) == self.levels:
                break
            try:
                other = in_other_words(self.model, task, text)
            except DataError as error:
                reasons.append(str(error))
                continue
            left = _asked(other, rows, usable)
            if len(left) >= max(FEWEST_FACTS, math.ceil(len(rows) / 2)):
                tasks.append(other)
                rows = left
            else:
                reasons.append(f"in {text!r:.80} it knows {len(left)} of the {len(rows)} facts")
        if wanted and len(tasks) == 1:
            why = f"there is no other wording in which {self.model.name} knows enough ({'; '.join(reasons[:2])})"
            none = "levels=1 is the task's own" if others else f"{task.relation.name} has a single template"
            self.left_out["template"] = why if reasons else none
            self.refused = bool(reasons)
        return tasks, rows

    def _ablations(self, task: Task, rows: Sequence[int], wanted: bool) -> list[Condition]:
        """A wording with each of the ablation's draws, the first as it is."""
        task = replace(task, val=task.val.select(rows), test=task.test.select([]))
        kind = ablation_kind(self.settled.ablation)
        found = [Condition(task, str(kind))]
        if wanted and self.levels == 1:
            self.left_out["ablation"] = "levels=1 is the ablation as it is"
        for level in range(1, self.levels if wanted else 1):
            drawn = kind.drawn_again(task, _number(self.seed, "ablation", level))
            if drawn is None:
                self.left_out["ablation"] = f"nothing in {kind} ablation is left to chance"
                break
            found.append(Condition(drawn[1], str(drawn[0])))
        return found

    def _settings(self) -> list[dict[str, Any]]:
        """Every combination of the settings that are drawn."""
        settled, known = self.settled, self.settled.settings
        varied: dict[str, list[Any]] = {}
        names = settled.method.varied
        if settled.method.scores:
            names = (*names, "threshold" if known.get("threshold") is not None else "edges")
            if known["select"] not in ("greedy", "optimal"):
                varied["select"] = ["signed", "absolute"]
        for name in names:
            value = known[name]
            if isinstance(value, bool):
                varied[name] = [False, True]
            elif name == "edges":
                most = self.model.graph.n_edges
                size = check_size(self.model.graph, value, self.model.name)
                varied[name] = list(dict.fromkeys(min(most, max(1, round(size * by))) for by in GRID))
            elif value is not None:
                varied[name] = [value * by for by in GRID]
        if not varied:
            self.left_out["setting"] = f"{settled.method.name} has no setting that could be varied"
        return [dict(zip(varied, chosen, strict=True)) for chosen in product(*varied.values())]

    def plan(self, draws: int, twins: int, halves: bool, shuffled: bool) -> Plan:
        """Draw."""
        conditions = [one for cell in self.cells for one in cell]
        if shuffled:
            conditions = [
                one._replace(task=with_shuffled_answers(self.model, one.task, _number(self.seed, "answers", i)))
                for i, one in enumerate(conditions)
            ]
        everyone = np.arange(self.n_facts)
        parts = []
        if halves:
            order = np.random.default_rng([self.seed, _stream("halves")]).permutation(self.n_facts)
            parts = [np.sort(order[: -(-self.n_facts // 2)]), np.sort(order[-(-self.n_facts // 2) :])]
        whole = self._drawn(conditions, everyone, draws, twins, 0)
        of_halves = [self._drawn(conditions, part, draws, 0, 1 + i) for i, part in enumerate(parts)]
        return replace(whole, halves=of_halves)

    def _drawn(self, conditions: list[Condition], facts: np.ndarray, draws: int, twins: int, number: int) -> Plan:
        rng = {name: np.random.default_rng([self.seed, _stream(name), number]) for name in SOURCES}
        counts = np.zeros((draws, self.n_facts), dtype=int)
        counts[:, facts] = 1
        if "facts" in self.wanted:
            counts[:, facts] = resample_counts(len(facts), draws, int(rng["facts"].integers(_LARGEST_SEED)))
        levels = {"template": len(self.cells), "ablation": len(self.cells[0]), "setting": len(self.settings)}
        values: dict[str, list[Any]] = {"facts": [tuple(row) for row in counts.tolist()]}
        values |= {name: rng[name].integers(many, size=draws).tolist() for name, many in levels.items()}
        values["order"] = rng["order"].integers(_LARGEST_SEED, size=draws).tolist()
        base = [{name: some[k] for name, some in values.items()} for k in range(draws)]
        again = {
            name: [self._draw(base[k] | {name: base[(k + 1) % draws][name]}) for k in range(twins)]
            for name in (self.wanted if twins else ())
        }
        used = np.isin(np.arange(self.n_facts), facts).tolist()
        drawn = {name: values[name] for name in self.wanted}
        if "setting" in drawn:
            drawn["setting"] = [self.settings[i] for i in drawn["setting"]]
        if "template" in drawn:
            drawn["template"] = [self.cells[i][0].task.template for i in drawn["template"]]
        return Plan(conditions, [self._draw(one) for one in base], again, used, [], drawn, self.left_out)

    def _draw(self, one: Mapping[str, Any]) -> Draw:
        settings = dict(self.settings[one["setting"]])
        if "order" in self.wanted:
            settings["order"] = one["order"]
        return Draw(one["template"] * len(self.cells[0]) + one["ablation"], one["facts"], settings)


def shares(counts: Sequence[int]) -> Float[Tensor, " N"]:
    """What each fact counts for in the mean over a draw's facts."""
    weights = torch.tensor(counts, dtype=torch.float32)
    return weights / weights.sum()


def _asked(task: Task, rows: Sequence[int], paired: bool) -> list[int]:
    """Those of some rows of D_val that the model knows, and that have a partner where one is needed."""
    good = task.val.known & task.val.paired if paired else task.val.known
    return [row for row in rows if bool(good[row])]


def _stream(name: str) -> int:
    return sum(ord(letter) << (8 * i) for i, letter in enumerate(name[:4]))


def _number(seed: int, name: str, level: int) -> int:
    """A seed for one level of a source."""
    return int(np.random.default_rng([seed, _stream(name), level]).integers(_LARGEST_SEED))
