"""Stability: would other facts, or other words, have given the same circuit.

Edge Jaccard (edges of both over edges of either) between circuits that were found in the same way and at the same
size, on bootstrap resamples of D_val or in other templates. Beside each pair stands the Jaccard of two random
connected circuits of the same sizes: what chance and size give by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.methods import check_method, check_size, scoring
from kcwb.discovery.registry import Settled
from kcwb.discovery.selection import select_edges
from kcwb.errors import DataError, SettingError, choose
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import resample_counts
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import Task, check_same_weights, encode, make_task
from kcwb.tasks.relations import Relation, load_relation
from kcwb.verbs import verb


@verb
def bootstrap_stability(
    model: Model,
    task: Task,
    method: str = "eap-ig",
    *,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    edges: Count | None = None,
    select: str = "signed",
    draws: Count = 20,
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> pd.DataFrame:
    """How much of the circuit stays when D_val's facts are drawn again.

    A draw takes as many facts from D_val as it has, with repetition; edges are scored on those and selected at the
    same size. The loss is a mean over facts, and so is an edge's score: each fact is scored once, and a draw's score
    is the mean of its facts'.

    Parameters
    ----------
    model, task, method, metric, ablation, select
        As in `kcwb.discover`; `method` is one that scores every edge.
    edges
        How many edges are asked for, before dangling ones are dropped. Default: 1% of all edges.
    draws
        Bootstrap resamples.
    seed
        Of the resamples and of the random circuits.
    progress
        Reported per fact that is scored.
    settings
        The method's own, such as `steps`.

    Returns
    -------
    DataFrame
        One row per pair of circuits: `left`, `right` (`D_val` for the circuit of all its facts, `draw 1`, ...),
        `left_edges`, `right_edges` (after dropping dangling ones), `jaccard`, and `random`, that of two random
        connected circuits of those sizes (NaN where one is empty). The rows with `left == "D_val"` tell how stable
        the circuit itself is.

    Raises
    ------
    DataError
        If D_val has a single fact, which every draw would repeat.
    SettingError
        If a setting cannot be meant.
    """
    settled, size = _check(model, method, metric, ablation, edges, select, settings)
    check_same_weights(model, task)
    cuts = make_ablation(model, task, settled.ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    n_facts = len(loss.prompts)
    if n_facts < 2:
        raise DataError(f"D_val of {task.relation.name} has a single fact, which every draw would repeat; use n >= 2.")
    by_fact = settled.by_fact(model, loss, cuts, progress)
    counts = torch.from_numpy(resample_counts(n_facts, draws, seed))
    shares = torch.cat([torch.ones(1, n_facts), counts]) / n_facts
    names = ["D_val", *(f"draw {draw}" for draw in range(1, draws + 1))]
    circuits = {
        name: _circuit(model.graph, torch.tensordot(share, by_fact, 1), size, select)
        for name, share in zip(names, shares, strict=True)
    }
    return _pairs(circuits, seed)


@verb
def template_stability(
    model: Model,
    relation: Relation | str,
    method: str = "eap-ig",
    *,
    templates: Sequence[int | str] | None = None,
    n: Count = 8,
    metric: str = "nll",
    ablation: str | AblationKind | None = None,
    edges: Count | None = None,
    select: str = "signed",
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> pd.DataFrame:
    """How much of the circuit stays when the same facts are asked for in other words.

    Parameters
    ----------
    model
        The model.
    relation
        A Relation, the name of one that comes with the package, or the path of a file.
    method, metric, ablation, edges, select, settings
        As in `bootstrap_stability`.
    templates
        Indices of the relation's zero-shot templates, or templates with `{}`; None for all zero-shot ones.
    n
        Facts: the same in every template, drawn from those that the model knows in all of them; fewer if it knows
        fewer.
    seed
        Of the facts and of the random circuits.
    progress
        Reported per template.

    Returns
    -------
    DataFrame
        One row per pair of templates: `left`, `right` (their texts), `facts` (how many were asked), `left_edges`,
        `right_edges`, `jaccard` and `random`, as in `bootstrap_stability`.

    Raises
    ------
    DataError
        If the model knows no fact in all of the templates.
    SettingError
        If there are fewer than two different templates, or a setting cannot be meant.
    """
    settled, size = _check(model, method, metric, ablation, edges, select, settings)
    relation = load_relation(relation) if isinstance(relation, str) else relation
    wanted = list(range(len(relation.prompt_templates_zs))) if templates is None else list(templates)
    if len(wanted) < 2 or len(set(wanted)) < len(wanted):
        raise SettingError(f"Stability over templates of {relation.name} needs at least two, all different: {wanted}.")
    circuits: dict[str, Circuit] = {}
    with track(progress, 2 * len(wanted), "stability") as step:
        tasks, everything = [], []
        for template in wanted:
            tasks.append(make_task(model, relation, n, seed, template))
            everything.append(encode(model, relation.facts, tasks[-1].template, relation.objects, seed))
            step()
        known = torch.stack([prompts.known for prompts in everything]).all(0).nonzero()[:, 0].cpu().numpy()
        if not len(known):
            counts = ", ".join(f"{task.n_known} in {task.template!r}" for task in tasks)
            raise DataError(
                f"{model.name} knows no fact of {relation.name} in all {len(wanted)} templates ({counts}). Leave some "
                "out: templates=..."
            )
        facts = sorted(np.random.default_rng(seed).permutation(known)[:n].tolist())
        for task, prompts in zip(tasks, everything, strict=True):
            asked = replace(task, val=prompts.select(facts))
            cuts = make_ablation(model, asked, settled.ablation)
            scores = settled.run(model, make_loss(model, cuts.usable(asked.val), metric), cuts)
            circuits[task.template] = _circuit(model.graph, scores, size, select)
            step()
    table = _pairs(circuits, seed)
    table.insert(2, "facts", len(facts))
    return table


def _check(
    model: Model,
    method: str,
    metric: str,
    ablation: str | AblationKind | None,
    edges: int | None,
    select: str,
    settings: dict[str, Any],
) -> tuple[Settled, int]:
    """What is run, and the number of edges to choose; SettingError, before any work, for what cannot be meant."""
    choose("The method", method, scoring())
    size = check_size(model.graph, edges, model.name)
    return check_method(method, metric, ablation, edges=size, select=select, **settings), size


def _circuit(graph: Graph, scores: Float[Tensor, "S R"], edges: int, select: str) -> Circuit:
    kept: Bool[Tensor, "S R"] = select_edges(graph, scores, edges=edges, select=select)
    return Circuit(graph, kept).without_dangling()


def _pairs(circuits: Mapping[str, Circuit], seed: int) -> pd.DataFrame:
    """Every pair of circuits, with the Jaccard of its edges and of two random circuits of the same sizes."""
    random = {
        name: random_circuit(circuit.graph, circuit.n_edges, seed + i) if circuit.n_edges else None
        for i, (name, circuit) in enumerate(circuits.items())
    }
    rows = []
    for left, right in combinations(circuits, 2):
        a, b, chance_a, chance_b = circuits[left], circuits[right], random[left], random[right]
        chance = math.nan if chance_a is None or chance_b is None else chance_a.iou(chance_b)
        rows.append((left, right, a.n_edges, b.n_edges, a.iou(b), chance))
    return pd.DataFrame(rows, columns=["left", "right", "left_edges", "right_edges", "jaccard", "random"])
