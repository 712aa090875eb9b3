"""Shared machinery: which heads serve many relations, and how much circuits of different relations overlap.

Knowledge Circuits (arXiv 2405.17969) found a few heads again in the circuits of several relations. Two things give such
overlap by themselves, and are taken off here: late layers hold most of the heads that write answers, so that a head is
compared with others *of its layer*; and large circuits overlap more than small ones, so that a pair of circuits is
compared with random ones *of the same sizes*. With H heads in a layer, of which relation r uses n_r, a head that is
drawn at random serves r with probability n_r / H: the number of relations that it serves is a sum of such draws, whose
distribution is the Poisson binomial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, inclusion, node_inclusion, weighted_iou
from kcwb.discovery.baselines import random_inclusion
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.models.graph import Graph
from kcwb.progress import Progress, track
from kcwb.reading.roles import NAMED, TOO_FEW, sureness
from kcwb.settings import Count, Seed
from kcwb.statistics import p_value, shared_by_chance
from kcwb.verbs import verb

_SERVING = (*NAMED, "suppressor")
_SURE = 0.5


@verb
def relation_matrix(tables: Mapping[str, pd.DataFrame], value: str = "contribution") -> pd.DataFrame:
    """What each head does for each relation, as a matrix to cluster and draw.

    Parameters
    ----------
    tables
        Relation -> a table of `kcwb.head_roles`.
    value
        A column of numbers of those tables, such as `D_S` or `z`, or `contribution`, D_S + D_R (logits).

    Returns
    -------
    DataFrame
        One row per relation, one column per head that has a role in at least one of them, from the first layer to the
        last. Where a head has no role the value is 0. What a head of an ensemble does counts by its `pi`, so that the
        value is the mean over draws, 0 in those without the head (`pi` itself and `to_logits` are such means already).

    Raises
    ------
    DataError
        If no head has a role.
    SettingError
        If a table has no such column.
    """
    rows = {}
    for relation, table in tables.items():
        some = table[table["role"].isin(_SERVING)].set_index("node")
        if value != "contribution" and not pd.api.types.is_numeric_dtype(table.get(value, pd.Series(["no"]))):
            raise SettingError(
                f"The table of {relation} has no column of numbers {value!r}; 'contribution' is D_S + D_R."
            )
        of_head = some["D_S"] + some["D_R"] if value == "contribution" else some[value]
        rows[relation] = of_head if value in ("pi", "to_logits") else of_head * sureness(some)
    if not any(map(len, rows.values())):
        raise DataError(f"No head has a role in any of {', '.join(map(repr, tables)) or 'no relations'}.")
    places = pd.concat(tables.values()).drop_duplicates("node").sort_values(["layer", "head"])["node"]
    matrix = pd.DataFrame(rows).T.reindex(index=list(tables))
    matrix = matrix[[node for node in places if node in matrix.columns]].astype(float).fillna(0.0)
    return matrix.rename_axis(index="relation", columns="node")


@verb
def shared_heads(graph: Graph, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Which heads serve how many relations, beside what chance gives a head of their layer.

    Parameters
    ----------
    graph
        The model's graph.
    tables
        Relation -> a table of `kcwb.head_roles`. A head serves a relation if it has a role in it (is not `other`) and,
        of an ensemble, is in half of its draws or more: what counts heads knows no half ones.
        Relations with too few facts for roles are left out.

    Returns
    -------
    DataFrame
        One row per head that serves a relation, those that serve most first: `node`, `layer`, `head`; `relations`, how
        many it serves, and `of`, how many there are; `expected`, how many a head drawn at random from its layer would
        serve; `p`, the probability that such a head serves as many or more; `q`, the same after Benjamini and Hochberg
        over all heads of the model; `roles`, how often it has which role; `names`, the relations.

    Raises
    ------
    DataError
        If fewer than two relations have roles.
    """
    tables = {name: table for name, table in tables.items() if not (table["role"] == TOO_FEW).any()}
    if len(tables) < 2:
        raise DataError(f"Shared machinery needs at least two relations with roles; there are {len(tables)}.")
    serving = pd.concat(
        [
            table[table["role"].isin(_SERVING) & (sureness(table) >= _SURE)].assign(relation=name)
            for name, table in tables.items()
        ],
        ignore_index=True,
    )
    per_layer = serving.groupby(["layer", "relation"]).size().unstack(fill_value=0) / graph.n_heads
    shares = {layer: row.to_numpy(dtype=float) for layer, row in per_layer.iterrows()}
    rows = []
    for (node, layer, head), some in serving.groupby(["node", "layer", "head"]):
        chances = shares[layer]
        counts = some["role"].value_counts()
        rows.append(
            {
                "node": node,
                "layer": layer,
                "head": head,
                "relations": len(some),
                "of": len(tables),
                "expected": chances.sum(),
                # summed from the tail: 1 - cdf would round small ones to 0
                "p": float(stats.poisson_binom.pmf(np.arange(len(some), len(tables) + 1), chances).sum()),
                "roles": ", ".join(f"{role} {counts[role]}" for role in _SERVING if role in counts),
                "names": ", ".join(some["relation"]),
            }
        )
    columns = ["node", "layer", "head", "relations", "of", "expected", "p", "q", "roles", "names"]
    if not rows:
        return pd.DataFrame(columns=columns)
    found = pd.DataFrame(rows)
    idle = np.ones(graph.n_layers * graph.n_heads - len(found))  # of those that serve nothing it is certain
    found["q"] = stats.false_discovery_control(np.concatenate([found["p"], idle]))[: len(found)]
    order = found.sort_values(["relations", "p", "layer", "head"], ascending=[False, True, True, True], kind="stable")
    return order[columns].reset_index(drop=True)


@verb
def circuit_overlap(
    circuits: Mapping[str, Circuit | Ensemble], *, draws: Count = 20, seed: Seed = 0, progress: Progress = True
) -> pd.DataFrame:
    """How many edges and nodes circuits of different relations share, beside random ones of the same sizes.

    The edges and nodes of an ensemble count by their pi (`kcwb.circuits.weighted_iou`). A blurred circuit overlaps less
    than a sure one, and so must what it is compared with: chance has the same pi, on other edges.

    Parameters
    ----------
    circuits
        Relation -> circuit or ensemble, all of one graph and none of them empty.
    draws
        Random connected circuits for each circuit, with as many edges; of an ensemble, with its pi on them
        (`kcwb.discovery.baselines.random_inclusion`). Random sets of nodes, which are cheap, are drawn 1,000 times:
        each head of the right circuit becomes another of its layer, the MLPs stay. Circuits of whatever relation hold
        nearly all MLPs and more of some layers' heads than of others', and overlap in those already by chance.
    seed
        Of the draws.
    progress
        Reported per random circuit.

    Returns
    -------
    DataFrame
        One row per pair: `left`, `right`; for edges, nodes and heads the Jaccard (those of both over those of either)
        as `edges`, `nodes`, `heads`; `random_...`, the mean of the same between random ones; and `p_...`, the share of
        draws (the pair itself counted in) in which it is at least as large. An ensemble whose draws differ has no
        `p_edges` (NaN): all connected circuits like some edges more than others, and its pi says which, so that
        unrelated ensembles would seem to share more than chance.

    Raises
    ------
    CircuitError
        If a circuit is empty, or graphs differ.
    SettingError
        If there are fewer than two circuits, or no draws.
    """
    if len(circuits) < 2:
        raise SettingError(f"{len(circuits)} circuits: an overlap needs at least 2.")
    graph = next(iter(circuits.values())).graph
    for name, circuit in circuits.items():
        if circuit.graph != graph or not node_inclusion(circuit).any():
            reason = "has no edges" if circuit.graph == graph else f"is part of {circuit.graph}, not of {graph}"
            raise CircuitError(f"The circuit of {name!r} {reason}.")
    pi = {name: matrix[matrix > 0] for name, matrix in ((name, inclusion(one)) for name, one in circuits.items())}
    random: dict[str, list[Tensor]] = {name: [] for name in circuits}
    with track(progress, len(circuits) * draws, "random circuits") as step:
        for number, (name, _) in enumerate(product(circuits, range(draws))):
            random[name].append(random_inclusion(graph, pi[name], seed + number))
            step()
    nodes = {name: node_grid(graph, circuit) for name, circuit in circuits.items()}
    generator = np.random.default_rng(seed)
    rows = []
    for left, right in combinations(circuits, 2):
        row: dict[str, object] = {"left": left, "right": right}
        pairs = zip(random[left], random[right], strict=True)
        chance = np.array([float(torch.minimum(a, b).sum()) / float(torch.maximum(a, b).sum()) for a, b in pairs])
        row |= _beside("edges", weighted_iou(circuits[left], circuits[right]), chance)
        if any(bool((pi[one] < 1).any()) for one in (left, right)):
            row["p_edges"] = math.nan
        one, other = nodes[left], nodes[right]
        drawn = random_shared_nodes(one, other, NODE_DRAWS, generator)
        for what, part in (("nodes", slice(None)), ("heads", slice(-1))):
            sizes = float(one[:, part].sum()), float(other[:, part].sum())
            shared = np.minimum(one[:, part], other[:, part]).sum()
            row |= _beside(what, float(_jaccard(shared, *sizes)), _jaccard(drawn[what], *sizes))
        rows.append(row)
    return pd.DataFrame(rows)


#: Random sets of nodes beside each pair.
NODE_DRAWS = 1000


def node_grid(graph: Graph, circuit: Circuit | Ensemble) -> Float[np.ndarray, "layers nodes"]:
    """How sure each head of a layer is, and in the last column its MLP."""
    return node_inclusion(circuit)[1:-1].reshape(graph.n_layers, graph.n_heads + 1)


def random_shared_nodes(
    left: Float[np.ndarray, "layers nodes"],
    right: Float[np.ndarray, "layers nodes"],
    draws: int,
    generator: np.random.Generator,
) -> dict[str, Float[np.ndarray, " draws"]]:
    """How many `nodes`, and `heads` among them, are shared when the right one's heads are others of their layers.

    The MLPs are those that they are: a layer has one.
    """
    heads = shared_by_chance(left[:, :-1], right[:, :-1], draws, generator)
    return {"heads": heads, "nodes": heads + np.minimum(left[:, -1], right[:, -1]).sum()}


def _jaccard(both: Any, left: float, right: float) -> Any:
    """Shared over either; 1 for two empty sets."""
    return both / (left + right - both) if left + right else np.ones(np.shape(both))


def _beside(what: str, own: float, chance: np.ndarray) -> dict[str, float]:
    return {what: own, f"random_{what}": float(chance.mean()), f"p_{what}": p_value(own, chance)}
