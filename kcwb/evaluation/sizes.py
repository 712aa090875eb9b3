"""How well circuits of growing size, all cut from the scores of one, answer alone: Hit@k against edges."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from kcwb.circuits.ablation import AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.selection import resize
from kcwb.errors import SettingError
from kcwb.evaluation.completeness import answered, cuts_of, summarised
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count
from kcwb.tasks.task import Task
from kcwb.verbs import verb

SIZES = (25, 50, 100, 200, 400, 800, 1600, 3200)


@verb
def size_curve(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    sizes: Sequence[Count] = SIZES,
    ablation: str | AblationKind | None = None,
    k: Count = 10,
    progress: Progress = True,
) -> pd.DataFrame:
    """Cut a scored circuit to several sizes, and run each alone.

    Parameters
    ----------
    model, task, ablation, k
        As in `kcwb.completeness`.
    circuit
        One whose every edge is scored, see `kcwb.resize`.
    sizes
        How many edges are asked for; those above the graph's number are left out.

    Returns
    -------
    DataFrame
        One row per size and split (`D_val`, `D_test`): `asked`; `edges`, those left on paths; `split`, `n`, `k`, `hit`
        (Hit@k), `low`, `high` (95%, Wilson's) and `nll` (mean, nats).

    Raises
    ------
    CircuitError
        If the circuit cannot be resized, or is of another model.
    SettingError
        If no size is left.
    """
    asked, sizes = sizes, sorted({size for size in sizes if size <= model.graph.n_edges})
    if not sizes:
        raise SettingError(
            f"sizes={list(asked)}: give at least one up to {model.name}'s {model.graph.n_edges:,} edges."
        )
    cuts = cuts_of(model, circuit, task, ablation)
    splits = cuts.splits(task)
    rows = []
    with track(progress, len(sizes) * len(splits), "sizes") as step:
        for size in sizes:
            one = resize(circuit, edges=size)
            for name, prompts in splits.items():
                found = summarised(*answered(model, one, prompts, cuts, k), k)
                rows.append({"asked": size, "edges": one.n_edges, "split": name, **found})
                step()
    return pd.DataFrame(rows)
