"""Circuits of some facts, each scored on its own, so that resampled facts have circuits without further runs.

A single fact has nothing to resample. What is left to chance in its circuit is the `setting` (how many edges, from half
of what was asked for to twice, by signed or absolute score) and what is by chance in the `ablation`; the words that it
is asked in are not drawn where the question is what they change. `fact_ensemble` draws those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.provenance import record
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.draws import GRID
from kcwb.discovery.selection import matched_circuit, select_edges
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.statistics import resample_counts
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import Task


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


def require_connected(circuit: Circuit, name: str, edges: int, more: str = "") -> None:
    """Refuse an empty circuit, of strongest edges that are not connected; `more` may help. CircuitError."""
    if not circuit.n_edges:
        raise CircuitError(
            f"The strongest edges of {name} are not connected: no circuit of about {edges} edges is left once "
            f"dangling ones are dropped. Ask for more edges{more}."
        )


def senders_in(circuit: Circuit) -> Bool[np.ndarray, " S"]:
    """Which senders have a kept edge."""
    matrix = circuit.node_matrix
    return (matrix.sum(0) + matrix.sum(1) > 0)[:-1]


class FactDraw(NamedTuple):
    """One draw of a single fact's circuit: against which of the ablations, of how many edges, by which scores."""

    ablation: int
    edges: int
    absolute: bool


def fact_draws(graph: Graph, edges: int, draws: int, ablations: int, seed: int) -> list[FactDraw]:
    """Some draws; with the same seed circuits are drawn in pairs, so that what differs between them is not the draw."""
    rng = np.random.default_rng(seed)
    sizes = [min(graph.n_edges, max(1, round(edges * by))) for by in GRID]
    columns = (rng.integers(many, size=draws).tolist() for many in (ablations, len(sizes), 2))
    return [FactDraw(one, sizes[size], bool(absolute)) for one, size, absolute in zip(*columns, strict=True)]


def fact_ensemble(
    graph: Graph, scores: Sequence[Float[Tensor, "S R"]], draws: Sequence[FactDraw], provenance: dict[str, Any]
) -> Ensemble:
    """The circuits of some draws, of the scores against each ablation."""
    after = [*draws[1:], draws[0]]
    both = list(zip(draws, after, strict=True))
    twins = {
        "setting": [other._replace(ablation=one.ablation) for one, other in both],
        "ablation": [one._replace(ablation=other.ablation) for one, other in both],
    }
    found = {}
    for one in dict.fromkeys([*draws, *twins["setting"], *twins["ablation"]]):
        value = scores[one.ablation].abs() if one.absolute else scores[one.ablation]
        found[one] = matched_circuit(graph, value, one.edges).kept.flatten().nonzero()[:, 0]
    ever = torch.cat(list(found.values())).unique()

    def masks(some: Sequence[FactDraw]) -> Bool[Tensor, "K M"]:
        return torch.stack([torch.isin(ever, found[one]) for one in some])

    places = torch.stack([ever // graph.n_receivers, ever % graph.n_receivers], 1)
    mean = torch.stack(list(scores)).mean(0)[*places.T].float().cpu()
    drawn = {"draws": len(draws), "drawn": [one._asdict() for one in draws]}
    return Ensemble(
        graph, places, masks(draws), {name: masks(some) for name, some in twins.items()}, mean, provenance | drawn
    )


def found_with(
    model: Model, task: Task, facts: Sequence[Fact], metric: str, ablation: str, edges: int, steps: int, **more: Any
) -> dict[str, Any]:
    """The provenance of a circuit of some facts."""
    how = {"method": "eap-ig" if steps > 1 else "eap", "metric": metric, "ablation": ablation}
    parameters = {"edges": edges, "select": "signed", "steps": steps}
    return record(model, task, facts, **how, parameters=parameters, **more)
