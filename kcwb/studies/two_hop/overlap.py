"""Do two hops use the circuits of each: how much of them the two-hop circuit has.

Knowledge Circuits (arXiv 2405.17969) compares the circuit of a two-hop question with those of its hops by the share
|two-hop and single| / |single| of nodes and of edges. Here the circuits of hop 1, hop 2 and the two-hop question are
cut at the same size, each on the same chains; **integrated** is the union of the two hops' circuits. Such a share says
nothing alone. Beside it stand random connected circuits of the same size (nodes: other heads of the same layers), which
any two real circuits beat, since all pass through the same late layers; and the circuits of other tasks (`controls`),
which is the comparison that can fail.

**Ensembles.** Of circuits that were drawn many times (`kcwb.discover_many` on `hops.tasks`), each edge and node counts
by its pi: two share the smaller of both, so that the Jaccard is `kcwb.circuits.weighted_iou`, and the union of the two
hops has the larger. Random circuits then have the same pi, on other edges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, inclusion, node_inclusion
from kcwb.discovery.baselines import random_inclusion
from kcwb.errors import CircuitError, choose
from kcwb.evaluation.overlap import NODE_DRAWS, random_shared_nodes
from kcwb.models.graph import Graph
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import mean_interval, p_value, resample_counts
from kcwb.studies.fact_circuits import resampled_circuit, resampled_weights
from kcwb.studies.two_hop.circuits import INTEGRATED, HopCircuits
from kcwb.tasks.hops import HOPS
from kcwb.verbs import verb

PARTS = ("edges", "nodes", "heads")


@verb
def hop_overlap(
    found: HopCircuits,
    *,
    ensembles: Mapping[str, Ensemble] | None = None,
    draws: Count = 20,
    resamples: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """How much of each circuit the two-hop circuit has, beside chance and controls.

    Parameters
    ----------
    ensembles
        Of some of the circuits, by name (`two-hop`, `hop 1`, `hop 2`, a control's), an ensemble that stands for it at
        the level of all facts.
    draws
        Pairs of random connected circuits of the same two sizes. Random sets of nodes, in which
        the heads are others of their layers and the MLPs stay, are drawn 1,000 times.
    resamples
        Bootstrap resamples of the chains, or of an ensemble's draws, for the interval of all facts together.

    Returns
    -------
    DataFrame
        One row per `level`, `circuit` and `part` (`edges`, `nodes`, `heads`; nodes are heads and MLPs):

        - `share`, |two-hop and circuit| / |circuit|, with its 95% interval `low`, `high`;
        - `random`, the mean of the same between random ones, and `p`, the share of random pairs (itself counted in) in
          which it is at least as large: one pair each, so that p is cautious where `share` is a mean over chains. The
          edges of ensembles whose draws differ have none (NaN), as in `kcwb.evaluation.circuit_overlap`;
        - `jaccard`, those of both over those of either, and `jaccard_low`, `jaccard_high`, `random_jaccard`;
        - `size_two_hop`, `size`: how many parts they have (means, at the level of facts and of ensembles); `facts`.

        The level `one fact` compares circuits of one chain at a time, as the paper does, and takes the mean; its
        interval is the bootstrap's of the mean over chains (NaN where all are alike). The level `all facts`
        compares the circuits of all chains together; its
        interval is that of the circuits of resampled chains, whose overlap is lower than that of the circuits
        themselves where resampling blurs them: it may lie below the value.

    Raises
    ------
    SettingError
        If an ensemble is of no circuit that there is.
    CircuitError
        If it is of another graph, or empty.
    """
    ensembles = dict(ensembles or {})
    _check(found, ensembles)
    graph, n_facts = found.circuits["two-hop"].graph, len(found.of_fact["two-hop"])
    # 1. what each circuit has, and how much
    whole = {name: _parts(one) for name, one in {**found.circuits, **ensembles}.items()}
    parts: dict[str, dict[str, list[_Parts]]] = {
        "one fact": {name: [_parts(one) for one in some] for name, some in found.of_fact.items()},
        "all facts": {name: [one] for name, one in _integrated(whole).items()},
    }
    sizes = {
        (level, name): np.mean([[one[part].sum() for part in PARTS] for one in some], axis=0)
        for level, circuits in parts.items()
        for name, some in circuits.items()
    }
    # 2. resampled circuits, and random ones of each size (or with each pi) on either side of a pair
    weights = {}
    for (level, name), size in sizes.items():
        pi = parts[level][name][0]["edges"]
        weights[level, name] = np.ones(round(size[0])) if level == "one fact" else pi[pi > 0]
    pools = {(key[1] != "two-hop", some.tobytes()): some for key, some in weights.items()}
    with track(progress, resamples + draws * len(pools), "overlap") as step:
        again = []
        for of_chains in resampled_weights(n_facts, resamples, seed):
            again.append(_resampled(found, ensembles, of_chains, seed + len(again)))
            step(note="resamples")
        random: dict[tuple[bool, bytes], list[Tensor]] = {key: [] for key in pools}
        for (single, key), some in pools.items():  # one seed never serves both sides of a pair
            for draw in range(draws):
                random[single, key].append(random_inclusion(graph, torch.from_numpy(some), seed + 2 * draw + single))
                step(note="random circuits")
    # 3. overlaps, with intervals and beside chance
    rows: list[dict[str, Any]] = []
    for level, name in itertools.product(parts, found.singles):
        both = list(zip(parts[level]["two-hop"], parts[level][name], strict=True))
        own = np.array([_overlap(*pair) for pair in both])
        spread = own if level == "one fact" else np.array([_overlap(one["two-hop"], one[name]) for one in again])
        left, right = sizes[level, "two-hop"], sizes[level, name]
        keys = (weights[level, one].tobytes() for one in ("two-hop", name))
        pairs = zip(*(random[pool] for pool in zip((False, True), keys, strict=True)), strict=True)
        edges = np.array([float(torch.minimum(a, b).sum()) for a, b in pairs])
        chance = _chance(edges, (left[0], right[0]), both, np.random.default_rng(seed + len(rows)))
        for i, part in enumerate(PARTS):
            row: dict[str, Any] = {"level": level, "circuit": name, "part": part}
            for j, (measure, prefix) in enumerate((("share", ""), ("jaccard", "jaccard_"))):
                ends = (
                    mean_interval(own[:, i, j], seed)
                    if level == "one fact"
                    else np.quantile(spread[:, i, j], [0.025, 0.975])
                )
                row |= {measure: float(own[:, i, j].mean()), f"{prefix}low": ends[0], f"{prefix}high": ends[1]}
            share, jaccard = chance[part]
            blurred = part == "edges" and any((weights[level, one] < 1).any() for one in ("two-hop", name))
            row |= {"random": float(share.mean()), "p": math.nan if blurred else p_value(row["share"], share)}
            row |= {"random_jaccard": float(jaccard.mean()), "size_two_hop": left[i], "size": right[i]}
            rows.append({**row, "facts": n_facts})
    return pd.DataFrame(rows)


_Parts = dict[str, np.ndarray]


def _check(found: HopCircuits, ensembles: Mapping[str, Ensemble]) -> None:
    """Refuse ensembles of something else."""
    known = [name for name in found.circuits if name != INTEGRATED]
    for name, one in ensembles.items():
        graph = found.circuits[choose("The ensemble", name, known)].graph
        if one.graph != graph or not one.size:
            reason = "has no edges" if one.graph == graph else f"is of {one.graph}, its circuit of {graph}"
            raise CircuitError(f"The ensemble of {name} {reason}.")


def _parts(one: Circuit | Ensemble) -> _Parts:
    """How sure edges, nodes (heads and MLPs) and heads are."""
    return _of_nodes(one.graph, inclusion(one).double().numpy().ravel(), node_inclusion(one))


def _of_nodes(graph: Graph, edges: np.ndarray, nodes: np.ndarray) -> _Parts:
    grid = nodes[1:-1].reshape(graph.n_layers, graph.n_heads + 1)  # without input and logits; the last are MLPs
    return {"edges": edges, "nodes": grid, "heads": grid[:, :-1]}


def _integrated(made: dict[str, _Parts]) -> dict[str, _Parts]:
    """With the integrated one, which has the larger pi of the two hops."""
    return made | {INTEGRATED: {part: np.maximum(made["hop 1"][part], made["hop 2"][part]) for part in PARTS}}


def _resampled(
    found: HopCircuits, ensembles: Mapping[str, Ensemble], of_chains: Float[Tensor, " N"], seed: int
) -> dict[str, _Parts]:
    """The parts of the circuits of resampled chains, and of ensembles of resampled draws; controls stay as they are."""
    made: dict[str, _Parts] = {}
    for name, scores in found.scores.items():
        if name in ensembles:
            one = ensembles[name]
            counts = torch.from_numpy(resample_counts(len(one), 1, seed)[0]).double() / len(one)
            edges = torch.zeros(one.graph.exists.shape, dtype=torch.float64)
            edges[*one.places.T] = counts @ one.kept.double()
            made[name] = _of_nodes(one.graph, edges.numpy().ravel(), (counts @ one.present.double()).numpy())
        else:
            circuit = found.circuits[name]
            made[name] = _parts(resampled_circuit(circuit, scores, of_chains) if name in HOPS else circuit)
    return _integrated(made)


def _overlap(two_hop: _Parts, single: _Parts) -> list[tuple[float, float]]:
    """Share and Jaccard of each part."""
    found = []
    for part in PARTS:
        left, right = two_hop[part], single[part]
        both, either = np.minimum(left, right).sum(), np.maximum(left, right).sum()
        found.append((both / (right.sum() or 1), both / (either or 1)))
    return found


def _chance(
    edges: np.ndarray, size: tuple[float, float], pairs: Sequence[tuple[_Parts, _Parts]], generator: np.random.Generator
) -> dict[str, Float[np.ndarray, "2 draws"]]:
    """Share and Jaccard of each part: of random circuits of these sizes that share so many edges, and of `pairs`.

    Of nodes each pair gives as many draws, with other heads of its layers.
    """
    found: dict[str, list[np.ndarray]] = {"edges": [_of_shared(edges, *size)], "nodes": [], "heads": []}
    for pair in pairs:
        left, right = (one["nodes"] for one in pair)
        drawn = random_shared_nodes(left, right, math.ceil(NODE_DRAWS / len(pairs)), generator)
        for part, both in drawn.items():
            found[part].append(_of_shared(both, *(float(one[part].sum()) for one in pair)))
    return {part: np.concatenate(some, axis=1) for part, some in found.items()}


def _of_shared(both: np.ndarray, left: float, right: float) -> Float[np.ndarray, "2 draws"]:
    """Share and Jaccard of what two circuits of some sizes have in common."""
    return np.stack([both / (right or 1), both / np.maximum(left + right - both, 1e-9)])
