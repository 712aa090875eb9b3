"""The same circuit under other ablations, on other prompts and beside other circuits.

- **Across ablations** (Miller et al., arXiv 2407.08734): a circuit that was found while cut edges deliver one thing may
  be none where they deliver another; nor is one of edges a good one of nodes.
- **Elsewhere**: facts that it was not found on, longer prompts, other templates of the relation, other relations.
- **Rivals**: the best circuits of its size without its strongest edges. If they do as well, it is one of many.

All compare shares of what the model gains over nothing (`Scores.recovered`), whose mean over facts is faithfulness.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import part
from kcwb.discovery.discover import score_edges
from kcwb.discovery.methods import METHODS, scoring
from kcwb.discovery.registry import DEFAULT
from kcwb.discovery.selection import chosen_by, matched_circuit
from kcwb.errors import DataError, SettingError, warn
from kcwb.evaluation.faithfulness import LEAST_GAIN, recovered_share
from kcwb.evaluation.referee.scores import Scores
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.statistics import statistic_interval
from kcwb.tasks.relations import Relation, load_relation, relation_files
from kcwb.tasks.task import Task, make_task

ABLATIONS = ("zero", "mean", "resample")
_KNOWN = 8  # facts of another relation that a model must know for the circuit to be tried on it

Step = Callable[..., None]


def measured(
    scores: Scores, circuit: Circuit, metric: str, seed: int, facts: np.ndarray | slice = slice(None)
) -> dict[str, Any]:
    """One row: how well the circuit does on some prompts, or on some of them, beside the model and nothing."""
    runs = {"": scores(circuit), "_model": scores.model_alone, "_empty": scores.empty}
    own, full, empty = (one.losses[metric][facts] for one in runs.values())
    gained, possible = empty - own, empty - full
    low, high = statistic_interval([gained, possible], recovered_share, seed)
    share = float(recovered_share(gained, possible))
    shares = (share, low, high) if float(possible.mean()) > LEAST_GAIN else (np.nan, np.nan, np.nan)
    return {
        "n": len(own),
        "hit_model": float(runs["_model"].hits[facts].mean()),
        "hit": float(runs[""].hits[facts].mean()),
        **{f"nll{of}": float(one.losses["nll"][facts].mean()) for of, one in runs.items()},
        **dict(zip(("faithfulness", "low", "high"), shares, strict=True)),
    }


def tells(scores: Scores, metric: str) -> bool:
    """Whether the model gains anything over nothing on these prompts, of which a circuit could have a share."""
    return float((scores.empty.losses[metric] - scores.model_alone.losses[metric]).mean()) > LEAST_GAIN


# --- other prompts ---


def other_templates(task: Task, most: int) -> list[str]:
    """Zero-shot templates of the relation that are not the task's."""
    return [template for template in task.relation.prompt_templates_zs if template != task.template][:most]


def other_relations(task: Task, given: int | Sequence[Relation], seed: int) -> Iterable[Relation]:
    """Relations to try the circuit on: those that are given, or those that come with the package, in random order."""
    if not isinstance(given, int):
        yield from given
        return
    names = [name for name in relation_files() if name != task.relation.name]
    for name in np.random.default_rng(seed).permutation(names) if given else []:
        yield load_relation(str(name))


def task_elsewhere(
    model: Model, relation: Relation, template: int | str, n: int, seed: int, without: Iterable[str] = ()
) -> Task | None:
    """Up to n facts that the model knows, of 2 n that it is asked, none about some subjects; None if it knows too few.

    That is less than 8, and less than half of those that there are.
    """
    excluded = set(without)
    facts = [fact for fact in relation.facts if fact.subject not in excluded]
    chosen = np.random.default_rng(seed).permutation(len(facts))[: 2 * n]
    some = replace(relation, facts=tuple(facts[i] for i in sorted(chosen)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # facts that cannot be told apart are of no interest here
        try:
            task = make_task(model, some, n=n, seed=seed, template=template, n_test=0)
        except DataError:
            return None
    return task if len(task.val) >= min(_KNOWN, len(some.facts) // 2) else None


# --- other ablations ---


def found_under(model: Model, task: Task, circuit: Circuit, own: str, step: Step) -> dict[str, Circuit]:
    """Ablation -> the circuit of this size that the same method finds under it; its own stays what it is.

    For a method that does not score edges, or is not known, the default method stands in.
    """
    found = {} if own in ABLATIONS else {own: circuit}
    for ablation in ABLATIONS:
        if ablation == own:
            found[ablation] = circuit
        elif ablation != "resample" or bool(task.val.paired.any()):
            scores = edge_scores(model, task, circuit, ablation)
            found[ablation] = matched_circuit(model.graph, scores, circuit.n_edges, chosen_by(circuit))
        step()
    return found


def edge_scores(model: Model, task: Task, circuit: Circuit, ablation: str | AblationKind) -> Float[Tensor, "S R"]:
    """Scores of all edges on D_val by the method, and in the metric, that the circuit was found with."""
    recorded = circuit.provenance
    method, given = str(recorded.get("method")), part(recorded, "parameters")
    method, given = (method, given) if method in scoring() else (DEFAULT, {})
    own = {name: given[name] for name in METHODS[method].own if name in given}
    metric = str(recorded.get("metric", "nll"))
    try:
        return score_edges(model, task, method, metric=metric, ablation=ablation, progress=False, **own)
    except SettingError as error:  # a metric, or a setting, of another version
        warn(f"Other circuits are scored by {DEFAULT}, not as this one was found: {error}")
        return score_edges(model, task, DEFAULT, ablation=ablation, progress=False)


def of_nodes(circuit: Circuit) -> Circuit:
    """The circuit of all edges between the nodes that a circuit keeps: what cutting whole nodes leaves."""
    graph, matrix = circuit.graph, circuit.node_matrix
    inside = torch.from_numpy(matrix.sum(0) + matrix.sum(1) > 0)
    return Circuit(graph, graph.exists & inside[:-1, None] & inside[graph.receiver_node][None])


def across(
    found: dict[str, Circuit], tested: dict[str, Scores], metric: str, seed: int, step: Step
) -> list[dict[str, Any]]:
    """The rows of `Judgement.matrix`."""
    rows = []
    for under, circuit in found.items():
        for level, one in {"edges": circuit, "nodes": of_nodes(circuit)}.items():
            for ablation, scores in tested.items():
                row = measured(scores, one, metric, seed)
                kept = {key: row[key] for key in ("faithfulness", "low", "high", "n")}
                rows.append({"found": under, "tested": ablation, "level": level, "edges": one.n_edges, **kept})
                step()
    return rows


def scores_under(model: Model, task: Task, scores: Scores, own: str) -> dict[str, Scores]:
    """Ablation -> scores of the same facts under it; the own one first."""
    found = {own: scores}
    for ablation in ABLATIONS:
        if ablation not in found and (ablation != "resample" or bool(scores.prompts.paired.all())):
            cuts = make_ablation(model, task, ablation)
            found[ablation] = Scores(model, scores.prompts, cuts, scores.metrics)
    return found


# --- other circuits ---


def rivals(
    circuit: Circuit, edge_scores: Float[Tensor, "S R"], without: Sequence[int]
) -> dict[int, tuple[Circuit, int]]:
    """How many of the circuit's strongest edges are barred -> the best circuit of its size, and how many they share."""
    graph, found = circuit.graph, {}
    strength = edge_scores if circuit.scores is None else circuit.scores.nan_to_num(0.0)
    rows, columns = circuit.kept.nonzero(as_tuple=True)
    order = strength[rows, columns].abs().argsort(descending=True, stable=True)
    for k in without:
        barred = edge_scores.abs()
        barred[rows[order[:k]], columns[order[:k]]] = -1.0
        rival = best_circuit(graph, barred, circuit.n_edges)
        found[k] = rival, (rival & circuit).n_edges
    return found


def best_circuit(graph: Graph, scores: Float[Tensor, "S R"], edges: int) -> Circuit:
    """About as many edges of high score, none of a negative one, all on paths from `input` to `logits`.

    Where a few edges are barred through which nearly all paths lead, the edges of highest score hang together only once
    there are many more of them. From the fewest that do the weakest are taken away again, so long as a path is left.
    """
    order = scores.masked_fill(~graph.exists, -1.0).flatten().argsort(descending=True, stable=True)
    order = order[: int(((scores >= 0) & graph.exists).sum())]

    def of(count: int) -> Circuit:
        kept = torch.zeros(graph.exists.numel(), dtype=torch.bool)
        kept[order[:count]] = True
        return Circuit(graph, kept.view_as(graph.exists)).without_dangling()

    count = bisect_left(range(len(order)), edges, key=lambda n: of(n).n_edges)
    circuit, needed = of(count), torch.zeros_like(graph.exists)
    while circuit.n_edges > edges:
        free = (circuit.kept & ~needed).nonzero()
        if not len(free):
            break
        weakest = free[scores[*free.T].argsort(stable=True)]
        for size in (circuit.n_edges - edges, *(2**i for i in reversed(range(6)))):
            kept = circuit.kept.clone()
            kept[*weakest[:size].T] = False
            fewer = Circuit(graph, kept).without_dangling()
            if fewer.n_edges >= edges or (size == 1 and fewer.n_edges):
                circuit = fewer
                break
        else:
            needed[*weakest[0]] = True
    return circuit
