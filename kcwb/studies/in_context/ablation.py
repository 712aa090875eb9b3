"""What a context's answers lose without its new heads, beside random ones of the same layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from kcwb.errors import DataError
from kcwb.interventions.head_sets import answers_without
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.reading.positions import split_of, told_at_end
from kcwb.settings import Count, Seed
from kcwb.statistics import matched_head_sets, p_value
from kcwb.studies.in_context.accuracy import hit_shares
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.shots import ShotTask
from kcwb.tasks.task import check_same_weights
from kcwb.verbs import verb

#: What is taken out, in the order of the paper's table.
ARMS = ("intact", "new heads", "random heads", "shared heads")


def asked_prompts(task: ShotTask, split: str) -> Prompts:
    """D_val or D_test; DataError if it is empty."""
    prompts = split_of(task, split)
    if not len(prompts):
        raise DataError(f"D_{split} of {task.relation.name} has no facts to ask; make the task with n_test >= 1.")
    return prompts


@verb
def ablate_new(
    model: Model,
    task: ShotTask,
    new: Sequence[str],
    shared: Sequence[str] = (),
    *,
    split: str = "test",
    draws: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """How the model answers without its new heads, without random ones of the same layers, and without the shared ones.

    Parameters
    ----------
    model, task
        A task with demonstrations, or a control.
    new, shared
        Names of heads, such as those of `new_heads`; arms without a head are left out.
    split
        `val` or `test`.
    draws
        Random sets of as many heads of the same layers, `new` ones excepted (of the nearest layers, where a layer has
        no more), no two alike; all that are possible, where there are fewer.

    Returns
    -------
    DataFrame
        One row per arm (`intact`, `new heads`, `random heads`, `shared heads`): `heads` (how many), `facts`, `hit_1`
        with `low` to `high`, `hit_10` with `low_10` to `high_10`, `nll` of the answer's first token (nats). The
        intervals are the 95% Wilson interval of the share of facts; for `random heads`, all of whose numbers are means
        over the draws, the 95% bootstrap interval of the mean over facts (NaN where it is the same for all). In the row
        of the new heads `p_hit_1`, `p_hit_10` and `p_nll`: the share of random sets (the new heads counted in) that do
        at least as much harm. NaN elsewhere, and if there are too few other heads to draw; the row of `random heads` is
        left out then, with a warning.

    Raises
    ------
    DataError
        If the split has no facts.
    CircuitError
        If a name is not a head of the model.
    SettingError
        If there are no draws.
    """
    check_same_weights(model, task)
    prompts = told_at_end(asked_prompts(task, split))
    new, shared = (list(dict.fromkeys(heads)) for heads in (new, shared))
    random = matched_head_sets(model.graph, new, draws, seed)
    arms: dict[str, list[Sequence[str]]] = {"intact": [()]}
    arms |= {"new heads": [new]} if new else {}
    arms |= {"random heads": [*random]} if random else {}
    arms |= {"shared heads": [shared]} if shared else {}
    every = list(dict.fromkeys(tuple(sorted(heads)) for sets in arms.values() for heads in sets))
    place = {heads: i for i, heads in enumerate(every)}
    ranks, losses = answers_without(model, prompts, every, task.context_of(prompts), progress=progress)
    rows, harm = [], {}
    for arm, sets in arms.items():
        index = [place[tuple(sorted(heads))] for heads in sets]
        shares = hit_shares(ranks[index], seed if arm == "random heads" else None)
        rows.append({"arm": arm, "heads": len(sets[0]), **shares, "nll": losses[index].mean()})
        hits = {f"hit_{k}": -(ranks[index] <= k).mean(-1) for k in (1, 10)}
        harm[arm] = {**hits, "nll": losses[index].mean(-1)}
    table = pd.DataFrame(rows)
    for name in ("hit_1", "hit_10", "nll"):
        table[f"p_{name}"] = math.nan
        if random:
            p = p_value(harm["new heads"][name][0], harm["random heads"][name])
            table.loc[table["arm"] == "new heads", f"p_{name}"] = p
    return table
