"""Can a circuit improve the model: its heads made stronger, and what the model gets wrong asked again.

If the heads of a circuit are those that recall a relation, a fact that the model gets wrong may be one that they say
too softly. So their outputs are multiplied by a factor at every position of the full model (no edge is cut):

1. the factor is the one of some that brings the lowest loss on D_val, 1 (nothing changed) among them;
2. with it the facts of D_test are asked again: of those that the model got wrong, how many are right now (`righted`),
   and of those that it got right, how many still are (`kept`). Right means that the first token of a right answer is
   the likeliest;
3. beside it, random sets of as many heads of the same layers by the same factor, and p, the share of sets, its own
   among them, that right as many.

A factor that rights facts and loses as many others has improved nothing: `hit_1` counts both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kcwb.errors import DataError, SettingError
from kcwb.interventions.head_sets import answers_without
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.reading.dla import named_heads
from kcwb.reading.positions import told_at_end
from kcwb.settings import Natural, Positive, Seed
from kcwb.statistics import chance_range, matched_head_sets, p_value, proportion_interval
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True, eq=False)
class Scaling:
    """What stronger heads do; made by `scale_heads`.

    Attributes
    ----------
    heads
        Their names.
    factor
        What their outputs were multiplied by; 1.0 where nothing does better on D_val than leaving them as they are.
    curve
        One row per factor: `factor`, and the `loss` on D_val (nats, mean of the answers' first tokens).
    summary
        One row each for `model`, `heads` and `random heads` (means over draws): `righted`, the share of the `n_wrong`
        facts of D_test that the model gets wrong, `kept`, the share of the `n_right` others, and `hit_1` over all.
        `low`, `high`: 95% intervals of `righted`; Wilson's of the share of facts, of random heads the middle 95% of the
        draws. `p` of `heads`, one-sided (NaN without draws, and for a factor of 1).
    facts
        One row per fact of D_test: `subject`, `object`, `rank_before`, `rank_after`.
    """

    heads: tuple[str, ...]
    factor: float
    curve: pd.DataFrame
    summary: pd.DataFrame
    facts: pd.DataFrame


@verb
def scale_heads(
    model: Model,
    task: Task,
    heads: Sequence[str],
    *,
    factors: Sequence[Positive] = FACTORS,
    draws: Natural = 50,
    seed: Seed = 0,
    progress: Progress = True,
) -> Scaling:
    """Make heads stronger or weaker by the factor that suits D_val, and ask D_test.

    Parameters
    ----------
    model, task
        The full model, and facts; make the task with a large `n_test`, since few facts are wrong. Facts whose answer's
        first token does not tell it apart are left out.
    heads
        One or more, for example all heads of a circuit, or its movers.
    factors
        What is tried beside 1.
    draws
        Random sets of heads of the same layers (fewer where there are not as many).
    progress
        Reported per set of heads that is run.

    Raises
    ------
    CircuitError
        If a name is not a head's.
    SettingError
        If no head is named.
    DataError
        If the model gets none of D_test's facts wrong.
    """
    named_heads(model, heads)
    chosen = tuple(dict.fromkeys(heads))
    if not chosen:
        raise SettingError("heads=[]: name at least one head, such as those of a circuit.")
    check_same_weights(model, task)
    tried = sorted({1.0, *map(float, factors)})
    val, test = told_at_end(task.val), told_at_end(task.test)
    before, _ = answers_without(model, test, [()], progress=False)
    wrong = before[0] > 1
    if not wrong.any():
        raise DataError(
            f"{model.name} gets all {len(test)} facts of D_test right: nothing is left to improve. Make the task with "
            "a larger n_test, or of a relation that the model knows less well."
        )
    _, losses = answers_without(model, val, [chosen] * len(tried), factors=tried, progress=progress)
    curve = pd.DataFrame({"factor": tried, "loss": losses.mean(1)})
    nearest = np.lexsort((np.abs(np.log(tried)), curve["loss"]))[0]  # of equally good ones the smallest change
    factor = tried[nearest]
    random = matched_head_sets(model.graph, chosen, draws, seed) if draws and factor != 1.0 else []
    sets = [chosen, *map(tuple, random)]
    after, _ = answers_without(model, test, sets, factors=[factor] * len(sets), progress=progress)
    ranks = np.concatenate([before, after])
    right = ranks == 1
    righted, kept, hits = (right[:, some].mean(1) if some.any() else np.full(len(ranks), np.nan)
                           for some in (wrong, ~wrong, np.ones_like(wrong)))  # fmt: skip
    mean, low, high = chance_range(righted[2:])
    counts = {"n_wrong": int(wrong.sum()), "n_right": int((~wrong).sum())}
    rows = [
        {"run": "model", "righted": 0.0, "kept": kept[0], "hit_1": hits[0]},
        {"run": "heads", "righted": righted[1], "kept": kept[1], "hit_1": hits[1]}
        | dict(zip(("low", "high"), proportion_interval(right[1, wrong]), strict=True))
        | {"p": p_value(float(righted[1]), righted[2:])},
    ]
    if random:
        others = {"righted": mean, "low": low, "high": high, "kept": kept[2:].mean(), "hit_1": hits[2:].mean()}
        rows.append({"run": "random heads", **others})
    summary = pd.DataFrame([counts | row for row in rows])
    columns = ["run", "n_wrong", "righted", "low", "high", "p", "n_right", "kept", "hit_1"]
    facts = pd.DataFrame(
        {
            "subject": [fact.subject for fact in test.facts],
            "object": [fact.object for fact in test.facts],
            "rank_before": ranks[0],
            "rank_after": ranks[1],
        }
    )
    return Scaling(chosen, factor, curve, summary.reindex(columns=columns), facts)
