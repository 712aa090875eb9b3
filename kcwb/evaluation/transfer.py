"""Do circuits generalise: each relation's circuit run alone on the facts of every relation.

A circuit that was found on one relation and answers another's questions holds machinery of both; one that answers its
own alone is that relation's. What cut edges deliver is made of the relation that is *asked*, so that an empty circuit
knows which kind of answer is asked for, and only what the circuit adds to that counts (faithfulness: the share of the
model's gain over nothing). Any circuit adds something by keeping a path from the input to the logits. So each stands
beside random circuits of its size on the same facts, all of their edges on such paths, and its p-value is the share of
circuits, its own among them, that recover as much.

All are asked D_test's facts that the model knows, none of which the circuit was found on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from kcwb.circuits.ablation import AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import DataError, SettingError
from kcwb.evaluation.faithfulness import recovered_share
from kcwb.evaluation.referee.elsewhere import measured
from kcwb.evaluation.referee.scores import Scores
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Natural, Seed
from kcwb.statistics import chance_range, p_value
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

#: Up to this many edges random circuits have exactly as many.
_FEW = 50


@verb
def transfer_matrix(
    model: Model,
    circuits: Mapping[str, Circuit],
    tasks: Mapping[str, Task],
    *,
    ablation: str | AblationKind = "mean",
    draws: Natural = 20,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """What every circuit recovers of every task.

    Parameters
    ----------
    model, circuits, tasks
        Name -> circuit, and name -> task: what has the same name belongs together (`own`). A circuit is asked nothing
        that it was found on: facts of any task's D_val are left out of the D_test of all.
    ablation
        What cut edges deliver, made of the task that is asked.
    draws
        Random circuits of each circuit's size (of more than 50 edges, give or take a twentieth), on each task; 0 for
        none.
    progress
        Reported per circuit that is run.

    Returns
    -------
    DataFrame
        One row per circuit and task: `circuit`, `task`, `own`; `edges`; `n` facts; `hit`, `hit_model` (Hit@10); `nll`,
        `nll_model`, `nll_empty` (nats); `faithfulness` with its 95% bootstrap interval over facts `low` to `high`, NaN
        where the model gains nothing over nothing; `chance`, `chance_high`, the mean and 97.5% quantile of the random
        circuits' faithfulness; `p`, one-sided, not corrected for the number of rows (NaN without draws, and of an empty
        circuit).

    Raises
    ------
    SettingError
        If no circuit, or no task, is given.
    DataError
        If the model knows no fact of a task's D_test, or the ablation is defined on none.
    """
    if not circuits or not tasks:
        raise SettingError("Give at least one circuit and one task.")
    for circuit in circuits.values():
        check_same_model(model, circuit)
    used = {fact for task in tasks.values() for fact in task.val.facts}
    unseen = {name: _unseen(model, name, task, used) for name, task in tasks.items()}
    rows = []
    with track(progress, len(tasks) * len(circuits) * (1 + draws), "transfer") as step:
        for name, task in tasks.items():
            cuts = make_ablation(model, task, ablation)
            scores = Scores(model, cuts.usable(unseen[name]), cuts, ["nll"])
            step(0, name)
            possible = scores.empty.losses["nll"] - scores.model_alone.losses["nll"]
            random: dict[int, list[float]] = {}
            for found, circuit in circuits.items():
                row = measured(scores, circuit, "nll", seed)
                step()
                size, told = min(_about(circuit.n_edges), model.graph.n_edges), draws
                if size not in random:
                    many = draws if size else 0  # there is one way to keep nothing
                    others = [random_circuit(model.graph, size, seed + i) for i in range(many)]
                    gains = [scores.empty.losses["nll"] - one.losses["nll"] for one in scores.each(others, step)]
                    random[size] = [float(recovered_share(gained, possible)) for gained in gains]
                    told -= many
                step(told)
                known = np.isfinite(row["faithfulness"])
                mean, _, high = chance_range(random[size])
                rows.append(
                    {"circuit": found, "task": name, "own": found == name, "edges": circuit.n_edges, **row}
                    | {"chance": mean if known else np.nan, "chance_high": high if known else np.nan}
                    | {"p": p_value(row["faithfulness"], random[size])}
                )
    return pd.DataFrame(rows)


def _about(edges: int) -> int:
    """A size within a twentieth of a circuit's, so that circuits of like sizes share their random ones."""
    return round(1.1 ** round(math.log(edges, 1.1))) if edges > _FEW else edges


def _unseen(model: Model, name: str, task: Task, used: set[Fact]) -> Prompts:
    """A task's facts that the model knows and no circuit was found on."""
    check_same_weights(model, task)
    rows = [i for i in task.test.known.nonzero()[:, 0].tolist() if task.test.facts[i] not in used]
    if not rows:
        raise DataError(
            f"{model.name} knows no fact of {name}'s D_test that no circuit was found on. Make the task with a larger "
            "n_test, or of a relation that the model knows."
        )
    return task.test.select(rows)
