"""How often the model answers, after each context."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from jaxtyping import Int

from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.shots import ShotTask
from kcwb.verbs import verb


@verb
def shot_accuracy(tasks: Iterable[ShotTask]) -> pd.DataFrame:
    """How often the model answers the questions of D_test, after each context.

    Returns
    -------
    DataFrame
        One row per task: `k`, `kind`, `facts`, `hit_1` (the share whose answer's first token is the first choice) with
        the 95% Wilson interval of that share of facts, `low` to `high`; `hit_10` with `low_10` to `high_10`.
    """
    rows = []
    for task in tasks:
        if len(task.test):
            rows.append({"k": task.k, "kind": task.kind, **hit_shares(task.test.ranks.cpu().numpy()[None])})
    columns = ["k", "kind", "facts", "hit_1", "low", "high", "hit_10", "low_10", "high_10"]
    return pd.DataFrame(rows, columns=columns)


def hit_shares(ranks: Int[np.ndarray, "sets N"], seed: int | None = None) -> dict[str, float]:
    """Hit@1 and Hit@10 with intervals over facts; with the seed of a bootstrap, as means over sets."""
    found: dict[str, float] = {"facts": ranks.shape[1]}
    for k, end in ((1, ""), (10, "_10")):
        hits = (ranks <= k).mean(0)
        low, high = proportion_interval(hits) if seed is None else mean_interval(hits, seed)
        found |= {f"hit_{k}": float(hits.mean()), f"low{end}": low, f"high{end}": high}
    return found
