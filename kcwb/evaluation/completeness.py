"""Is the circuit the model: run alone, does it still answer, also facts that it was not found on.

The completeness of Knowledge Circuits (arXiv 2405.17969, Table 1): Hit@10 of the circuit on D_val and D_test, beside
the full model, the empty circuit, and random connected circuits with as many edges.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import KcwbError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb


@verb
def completeness(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | AblationKind | None = None,
    k: Count = 10,
    draws: Natural = 10,
    seed: Seed = 0,
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
        Of the random circuits, and of the bootstrap of their interval.

    Returns
    -------
    DataFrame
        One row per run (`full model`, `circuit`, `empty circuit`, `random circuits`) and split (`D_val`, `D_test`, and
        `D_test, known`: those of D_test that the full model knows): `edges`, `nodes`, number of facts `n`, `k`, `hit`
        (Hit@k), `low` and `high`, `nll` (mean, nats). `low` and `high` are the 95% Wilson interval of the share of
        facts; for `random circuits`, where each fact's hit is a mean over draws, the 95% bootstrap interval of the mean
        over facts, given these circuits (NaN where it is the same for all facts).
    """
    cuts = cuts_of(model, circuit, task, ablation)
    splits = cuts.splits(task)
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
                    scored.append(answered(model, one, prompts, cuts, k))
                    step()
                hits, losses = (torch.stack(column).mean(0) for column in zip(*scored, strict=True))
                parts = {split: slice(None)} | ({"D_test, known": prompts.known.cpu()} if split == "D_test" else {})
                for label, chosen in parts.items():
                    some = summarised(hits[chosen], losses[chosen], k, seed if name == "random circuits" else None)
                    rows.append({"run": name, **size, "split": label, **some})
    return pd.DataFrame(rows)


def cuts_of(model: Model, circuit: Circuit, task: Task, ablation: str | AblationKind | None) -> Ablation:
    """What cut edges deliver, by default as the circuit was found; refuses circuits and tasks of another model."""
    check_same_model(model, circuit)
    check_same_weights(model, task)
    return make_ablation(model, task, ablation or circuit.ablation)


def answered(model: Model, circuit: Circuit | None, prompts: Prompts, cuts: Ablation, k: int) -> tuple[Tensor, Tensor]:
    """Hit@k and nll of each prompt, on the CPU."""
    logits = run_circuit(model, circuit, prompts, cuts)
    hits = (answer_ranks(logits, prompts) <= k).double()
    losses = make_loss(model, prompts, "nll").per_prompt(logits).double()
    if not torch.isfinite(losses).all():
        raise KcwbError("The logits of a run are not numbers: they overflow. Use float32.")
    return hits.cpu(), losses.cpu()


def summarised(hits: Tensor, losses: Tensor, k: int, seed: int | None = None) -> dict[str, float]:
    """One row; `seed` is that of the bootstrap where hits are means over draws."""
    if not len(hits):
        return {"n": 0, "k": k, "hit": np.nan, "low": np.nan, "high": np.nan, "nll": np.nan}
    low, high = proportion_interval(hits) if seed is None else mean_interval(hits, seed)
    return {"n": len(hits), "k": k, "hit": float(hits.mean()), "low": low, "high": high, "nll": float(losses.mean())}
