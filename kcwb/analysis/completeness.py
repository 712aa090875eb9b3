"""Is the circuit the model: run alone, does it still answer, also facts that it was not found on.

The completeness of Knowledge Circuits (arXiv 2405.17969, Table 1): Hit@10 of the circuit on D_val and D_test, beside
the full model, the empty circuit, and random connected circuits with as many edges.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import KcwbError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.prompts import Prompts, Task, check_same_weights

_RESAMPLES = 9999


def completeness(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | None = None,
    k: int = 10,
    draws: int = 10,
    seed: int = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Compare a circuit, run alone, with the full model, the empty circuit and random circuits.

    Parameters
    ----------
    model, circuit, task
        The circuit is run on the task's D_val and D_test, each scored against its own answers.
    ablation
        What cut edges deliver; None for what the circuit was found with (`zero` if that is not known).
    k
        An answer counts as a hit when its rank (`kcwb.tasks.ranks`) is at most k.
    draws
        Random connected circuits, each with as many edges as the circuit; their Hit@k is the mean over draws. With 0
        the row is left out.
    seed
        Of the random circuits and the bootstrap.
    progress
        Reported per run.

    Returns
    -------
    DataFrame
        One row per run (`full model`, `circuit`, `empty circuit`, `random circuits`) and split (`D_val`, `D_test`, and
        `D_test, known`: those of D_test that the full model knows): `edges`, `nodes`, number of facts `n`, `hit`
        (Hit@k), `low` and `high` (its 95% interval, see `proportion_interval`), `nll` (mean, nats).
    """
    check_same_model(model, circuit)
    check_same_weights(model, task)
    if draws < 0 or k < 1:
        raise SettingError(
            f"draws={draws}, k={k}: there are 0 or more random circuits, and Hit@k needs a k of at least 1."
        )
    cuts = make_ablation(model, task, ablation or circuit.ablation)
    splits = {"D_val": cuts.usable(task.val)}
    if len(task.test):
        splits["D_test"] = cuts.usable(task.test)
    runs: list[tuple[str, list[Circuit | None]]] = [
        ("full model", [None]),
        ("circuit", [circuit]),
        ("empty circuit", [Circuit.empty(model.graph)]),
    ]
    if circuit.n_edges and draws:
        random = [random_circuit(model.graph, circuit.n_edges, seed + draw) for draw in range(draws)]
        runs.append(("random circuits", [*random]))
    rows = []
    with track(progress, sum(len(some) for _, some in runs) * len(splits), "completeness") as step:
        for name, circuits in runs:
            sizes = [Circuit.full(model.graph) if one is None else one for one in circuits]
            size = {"edges": sizes[0].n_edges, "nodes": float(np.mean([one.n_nodes for one in sizes]))}
            for split, prompts in splits.items():
                scored = []
                for one in circuits:
                    scored.append(_score(model, one, prompts, cuts, k))
                    step()
                hits, losses = (torch.stack(column).mean(0) for column in zip(*scored, strict=True))
                for label, chosen in _subsets(split, prompts):
                    rows.append({"run": name, **size, "split": label, **_summary(hits[chosen], losses[chosen], seed)})
    return pd.DataFrame(rows)


def _score(model: Model, circuit: Circuit | None, prompts: Prompts, cuts: Ablation, k: int) -> tuple[Tensor, Tensor]:
    """Hit@k and nll of each prompt, on the CPU."""
    logits = run_circuit(model, circuit, prompts, cuts)
    hits = (answer_ranks(logits, prompts) <= k).double()
    losses = make_loss(model, prompts, "nll").per_prompt(logits).double()
    if not torch.isfinite(losses).all():
        raise KcwbError("The logits of a run are not numbers: they overflow. Use float32.")
    return hits.cpu(), losses.cpu()


def _subsets(split: str, prompts: Prompts) -> Iterator[tuple[str, Tensor]]:
    yield split, torch.ones(len(prompts), dtype=torch.bool)
    if split == "D_test":
        yield "D_test, known", prompts.known.cpu()


def _summary(hits: Tensor, losses: Tensor, seed: int) -> dict[str, float]:
    if not len(hits):
        return {"n": 0, "hit": np.nan, "low": np.nan, "high": np.nan, "nll": np.nan}
    low, high = proportion_interval(hits.numpy(), seed)
    return {"n": len(hits), "hit": float(hits.mean()), "low": low, "high": high, "nll": float(losses.mean())}


def proportion_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """A 95% interval of a mean of values in [0, 1], over facts.

    The percentile bootstrap (9,999 resamples). Where all values are equal the bootstrap knows no spread and would claim
    certainty; then, and for a single value, it is Wilson's interval for that proportion instead.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or bool((values == values[0]).all()):
        share, n, z = float(values[0]), len(values), float(stats.norm.ppf(0.975))
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)
    return _bootstrap(values, seed)


def mean_interval(values: Float[np.ndarray, " n"], seed: int = 0) -> tuple[float, float]:
    """A 95% interval of a mean: `proportion_interval` for shares, else the percentile bootstrap (NaN for one value)."""
    values = np.asarray(values, dtype=float)
    if bool(((values >= 0) & (values <= 1)).all()):
        return proportion_interval(values, seed)
    return _bootstrap(values, seed) if len(values) > 1 else (np.nan, np.nan)


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    draw = np.random.default_rng(seed)
    found = stats.bootstrap((values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=draw)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
