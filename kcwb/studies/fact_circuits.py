"""Circuits of some facts, each scored on its own, so that resampled facts have circuits without further runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import record
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.selection import select_edges
from kcwb.models.loading import Model
from kcwb.statistics import resample_counts
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import Task
from kcwb.tasks.relations import Fact


def scores_by_fact(
    model: Model, task: Task, rows: Sequence[int], cuts: Ablation, metric: str, steps: int, step: Callable[[], object]
) -> Float[Tensor, "N S R"]:
    """EAP-IG's scores of some prompts of D_val, one by one; of a fact that comes again, those that it had."""
    loss, known = make_loss(model, task.val, metric), {}
    for i in rows:
        fact = task.val.facts[i]
        if fact not in known:
            known[fact] = attribution_scores(model, loss.select([i]), cuts, steps=steps)
            step()
    return torch.stack([known[task.val.facts[i]] for i in rows])


def resampled_weights(n: int, draws: int, seed: int) -> Float[Tensor, "draws N"]:
    """How much each of n facts counts in bootstrap resamples of them."""
    return torch.from_numpy(resample_counts(n, draws, seed)).float() / n


def resampled_circuit(circuit: Circuit, scores: Float[Tensor, "N S R"], weights: Float[Tensor, " N"]) -> Circuit:
    """The circuit of resampled facts, of as many of the highest scores as were taken for that of all facts."""
    assert circuit.scores is not None  # matched_circuit sets them
    graph, own = circuit.graph, circuit.scores
    asked = int(((own >= own[circuit.kept].min()) & graph.exists).sum())
    return Circuit(graph, select_edges(graph, torch.tensordot(weights, scores, 1), edges=asked)).without_dangling()


def senders_in(circuit: Circuit) -> Bool[np.ndarray, " S"]:
    """Which senders have a kept edge."""
    matrix = circuit.node_matrix
    return (matrix.sum(0) + matrix.sum(1) > 0)[:-1]


def found_with(
    model: Model, task: Task, facts: Sequence[Fact], metric: str, ablation: str, edges: int, steps: int, **more: Any
) -> dict[str, Any]:
    """The provenance of a circuit of some facts."""
    how = {"method": "eap-ig" if steps > 1 else "eap", "metric": metric, "ablation": ablation}
    parameters = {"edges": edges, "select": "signed", "steps": steps}
    return record(model, task, facts, **how, parameters=parameters, **more)
