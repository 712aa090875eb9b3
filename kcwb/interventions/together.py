"""How heads work together: what two of them are worth beyond what each is worth alone.

With M the loss of the full model without some heads (their outputs zero at every position),

    I = M(without i and j) - M(without i) - M(without j) + M.

I > 0: without both more is lost than without each in turn, as where either stands in for the other (a backup). I < 0:
less is lost, as where one works through the other, so that without the first the second is worth nothing any more.

Any two heads interact a little, and late ones more than early ones. So each pair stands beside random pairs of heads of
the same layers, and its p-value is the share of pairs, its own among them, with an |I| as large.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kcwb.errors import SettingError
from kcwb.interventions.head_sets import answers_without
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.reading.dla import named_heads
from kcwb.reading.positions import told_at_end
from kcwb.settings import Natural, Seed
from kcwb.statistics import chance_range, holm, matched_head_sets, mean_interval, p_value
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb


@verb
def heads_together(
    model: Model,
    task: Task | Prompts,
    heads: Sequence[str],
    *,
    draws: Natural = 50,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """The interaction of every two of some heads, beside that of random pairs of their layers.

    Parameters
    ----------
    task
        A task, for its D_val, or any prompts. Facts whose answer's first token does not tell it apart are left out.
    heads
        Two or more, for example the movers and relation heads of a circuit.
    draws
        Random pairs for each pair, of the same two layers (or of the nearest, where a layer has no others), none of
        `heads` among them.
    progress
        Reported per set of heads that is taken out.

    Returns
    -------
    DataFrame
        One row per pair, the largest |I| first: `left`, `right`; `interaction`, the mean of I over facts (nats of the
        answer's first token), with its 95% bootstrap interval `low` to `high`; `without_left`, `without_right`,
        `without_both`, the rise of the loss; `chance`, `chance_low`, `chance_high`, the mean and middle 95% of I of the
        random pairs; `p`, two-sided, and `holm`, the same after Holm's correction over the pairs (NaN without draws:
        of n pairs none can be below n / (1 + draws)); `draws`, how many random pairs there were.

    Raises
    ------
    CircuitError
        If a name is not a head's.
    SettingError
        If there are fewer than two heads.
    DataError
        If no fact is left.
    """
    named_heads(model, heads)
    heads = list(dict.fromkeys(heads))
    if len(heads) < 2:
        raise SettingError(f"heads={heads}: name at least two different heads.")
    if isinstance(task, Task):
        check_same_weights(model, task)
    prompts = told_at_end(task.val if isinstance(task, Task) else task)
    pairs = [*itertools.combinations(heads, 2)]
    random = [
        [tuple(one) for one in matched_head_sets(model.graph, pair, draws, seed + i, taken=heads)] if draws else []
        for i, pair in enumerate(pairs)
    ]
    both = dict.fromkeys(tuple(sorted(pair)) for pair in itertools.chain(pairs, *random))
    sets = [(), *((head,) for head in dict.fromkeys(itertools.chain(*both))), *both]
    _, losses = answers_without(model, prompts, sets, progress=progress)
    loss = dict(zip(sets, losses, strict=True))
    whole = loss[()]

    def interaction(pair: Sequence[str]) -> np.ndarray:
        left, right = pair
        return loss[tuple(sorted(pair))] - loss[left,] - loss[right,] + whole

    rows = []
    for pair, others in zip(pairs, random, strict=True):
        own, chance = interaction(pair), [float(interaction(other).mean()) for other in others]
        mean, low, high = chance_range(chance)
        rises = (loss[pair[0],], loss[pair[1],], loss[tuple(sorted(pair))])
        rows.append(
            {
                "left": pair[0],
                "right": pair[1],
                "interaction": float(own.mean()),
                **dict(zip(("low", "high"), mean_interval(own, seed), strict=True)),
                **{
                    f"without_{name}": float((rise - whole).mean())
                    for name, rise in zip(("left", "right", "both"), rises, strict=True)
                },
                **{"chance": mean, "chance_low": low, "chance_high": high},
                "p": p_value(abs(float(own.mean())), np.abs(chance)),
                "draws": len(others),
            }
        )
    table = pd.DataFrame(rows)
    table.insert(len(table.columns) - 1, "holm", holm(table["p"]))
    return table.sort_values("interaction", key=abs, ascending=False, kind="stable", ignore_index=True)
