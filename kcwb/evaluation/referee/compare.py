"""Several circuits before the referee, all on the same facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.errors import SettingError
from kcwb.evaluation.referee.hearing import subjects_of
from kcwb.evaluation.referee.judgement import NO, YES, Judgement
from kcwb.evaluation.referee.referee import check_judged, referee
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Share
from kcwb.tasks.task import Task
from kcwb.verbs import verb


@verb
def rank_circuits(
    model: Model,
    circuits: Mapping[str, Circuit | Ensemble],
    task: Task,
    *,
    confidence: Share = 0.5,
    progress: Progress = True,
    **settings: Any,
) -> tuple[pd.DataFrame, dict[str, Judgement]]:
    """Judge several circuits on the facts that none of them was found on, and put them in order.

    Parameters
    ----------
    model, task, confidence, progress
        As in `kcwb.referee`.
    circuits
        Name -> circuit or ensemble. Each is judged under the ablation that it was found with, if `ablation` is not
        among the settings.
    settings
        Of `kcwb.referee`.

    Returns
    -------
    tuple
        A table, the best circuit first: `circuit`, `edges`, `faithfulness` with `low` and `high` (on other facts), then
        `yes`, `no` and `not_shown`, how many questions are answered so, and a column with each question's verdict. The
        order is that of fewer no, more yes, then faithfulness. And the judgements by name.

    Raises
    ------
    SettingError
        If there are fewer than two circuits.
    CircuitError
        If one is empty or whole, or belongs to another model.
    """
    if len(circuits) < 2:
        raise SettingError(f"{len(circuits)} circuits: there is nothing to rank; give two at least.")
    settled = {name: one if isinstance(one, Circuit) else one.consensus(confidence) for name, one in circuits.items()}
    for one in settled.values():
        check_judged(model, one)
    seen = set().union(*(subjects_of(one, task) for one in settled.values()))
    exclude = sorted(seen | set(settings.pop("exclude", ())))
    judged = {
        name: referee(model, one, task, exclude=exclude, progress=progress, **settings) for name, one in settled.items()
    }
    rows = []
    for name, judgement in judged.items():
        answers, table = judgement.answers, judgement.elsewhere
        here = table[(table["kind"] == "facts") & (table["name"] == "others")].iloc[0]
        row = {"circuit": name, "edges": settled[name].n_edges}
        row |= {key: float(here[key]) for key in ("faithfulness", "low", "high")}
        row |= {"yes": int((answers == YES).sum()), "no": int((answers == NO).sum())}
        row["not_shown"] = len(answers) - row["yes"] - row["no"]
        rows.append(row | answers.to_dict())
    order = pd.DataFrame(rows).sort_values(
        ["no", "yes", "faithfulness"], ascending=[True, False, False], kind="stable", ignore_index=True
    )
    return order, judged
