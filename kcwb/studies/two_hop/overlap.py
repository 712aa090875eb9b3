"""Do two hops use the circuits of each: how much of them the two-hop circuit has.

Knowledge Circuits (arXiv 2405.17969) compares the circuit of a two-hop question with those of its hops by the share
|two-hop and single| / |single| of nodes and of edges. Here the circuits of hop 1, hop 2 and the two-hop question are
cut at the same size, each on the same chains; **integrated** is the union of the two hops' circuits. Such a share says
nothing alone. Beside it stand random connected circuits of the same size (nodes: as many heads and as many MLPs), which
any two real circuits beat, since all pass through the same late layers; and the circuits of other tasks (`controls`),
which is the comparison that can fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.models.graph import Graph
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import mean_interval, p_value
from kcwb.studies.fact_circuits import resampled_circuit, resampled_weights, senders_in
from kcwb.studies.two_hop.circuits import INTEGRATED, HopCircuits
from kcwb.tasks.hops import HOPS
from kcwb.verbs import verb

PARTS = ("edges", "nodes", "heads")
_NODE_DRAWS = 1000


@verb
def hop_overlap(
    found: HopCircuits, *, draws: Count = 20, resamples: Count = 100, seed: Seed = 0, progress: Progress = True
) -> pd.DataFrame:
    """How much of each circuit the two-hop circuit has, beside chance and controls.

    Parameters
    ----------
    draws
        Pairs of random connected circuits of the same two sizes. Random sets of nodes, with as many heads and as many
        MLPs, are drawn 1,000 times.
    resamples
        Bootstrap resamples of the chains, for the interval of all facts together.

    Returns
    -------
    DataFrame
        One row per `level`, `circuit` and `part` (`edges`, `nodes`, `heads`; nodes are heads and MLPs):

        - `share`, |two-hop and circuit| / |circuit|, with its 95% interval `low`, `high`;
        - `random`, the mean of the same between random ones, and `p`, the share of random pairs (itself counted in) in
          which it is at least as large: one pair each, so that p is cautious where `share` is a mean over chains;
        - `jaccard`, those of both over those of either, and `jaccard_low`, `jaccard_high`, `random_jaccard`;
        - `size_two_hop`, `size`: how many parts they have (means, at the level of facts); `facts`.

        The level `one fact` compares circuits of one chain at a time, as the paper does, and takes the mean; its
        interval is the bootstrap's of the mean over chains (NaN where all are alike). The level `all facts`
        compares the circuits of all chains together; its
        interval is that of the circuits of resampled chains, whose overlap is lower than that of the circuits
        themselves where resampling blurs them: it may lie below the value.
    """
    graph, n_facts = found.circuits["two-hop"].graph, len(found.of_fact["two-hop"])
    # 1. what each circuit has, and how much
    parts: dict[str, dict[str, list[_Parts]]] = {
        "one fact": {name: [_parts(one) for one in some] for name, some in found.of_fact.items()},
        "all facts": {name: [_parts(one)] for name, one in found.circuits.items()},
    }
    sizes = {
        (level, name): np.mean([[int(one[part].sum()) for part in PARTS] for one in some], axis=0)
        for level, circuits in parts.items()
        for name, some in circuits.items()
    }
    # 2. resampled circuits, and random ones of each size on either side of a pair
    pools = {(name != "two-hop", round(float(size[0]))) for (_, name), size in sizes.items()}
    with track(progress, resamples + draws * len(pools), "overlap") as step:
        again = []
        for weights in resampled_weights(n_facts, resamples, seed):
            again.append(_resampled(found, weights))
            step(note="resamples")
        random: dict[tuple[bool, int], list[Tensor]] = {}
        for single, size in sorted(pools):  # one seed never serves both sides of a pair
            random[single, size] = []
            for draw in range(draws):
                random[single, size].append(random_circuit(graph, size, seed + 2 * draw + single).kept)
                step(note="random circuits")
    # 3. overlaps, with intervals and beside chance
    rows: list[dict[str, Any]] = []
    for level, name in itertools.product(parts, found.singles):
        own = np.array([_overlap(*pair) for pair in zip(parts[level]["two-hop"], parts[level][name], strict=True)])
        spread = own if level == "one fact" else np.array([_overlap(one["two-hop"], one[name]) for one in again])
        left, right = sizes[level, "two-hop"], sizes[level, name]
        pairs = zip(random[False, round(float(left[0]))], random[True, round(float(right[0]))], strict=True)
        chance = _chance(graph, left, right, [int((a & b).sum()) for a, b in pairs], seed + len(rows))
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
            row |= {"random": float(share.mean()), "p": p_value(row["share"], share)}
            row |= {"random_jaccard": float(jaccard.mean()), "size_two_hop": left[i], "size": right[i]}
            rows.append({**row, "facts": n_facts})
    return pd.DataFrame(rows)


_Parts = dict[str, np.ndarray]


def _parts(circuit: Circuit) -> _Parts:
    """Which edges, nodes (heads and MLPs) and heads a circuit has."""
    nodes = senders_in(circuit)[1:]  # without input
    heads = np.arange(len(nodes)) % (circuit.graph.n_heads + 1) < circuit.graph.n_heads
    return {"edges": circuit.kept.numpy().ravel(), "nodes": nodes, "heads": nodes & heads}


def _resampled(found: HopCircuits, weights: Float[Tensor, " N"]) -> dict[str, _Parts]:
    """The parts of the circuits of resampled chains; controls stay what they are."""
    made = {
        name: resampled_circuit(found.circuits[name], scores, weights) if name in HOPS else found.circuits[name]
        for name, scores in found.scores.items()
    }
    made[INTEGRATED] = made["hop 1"] | made["hop 2"]
    return {name: _parts(one) for name, one in made.items()}


def _overlap(two_hop: _Parts, single: _Parts) -> list[tuple[float, float]]:
    """Share and Jaccard of each part."""
    found = []
    for part in PARTS:
        left, right = two_hop[part], single[part]
        both, either = int((left & right).sum()), int((left | right).sum())
        found.append((both / max(1, int(right.sum())), both / max(1, either)))
    return found


def _chance(
    graph: Graph, left: np.ndarray, right: np.ndarray, shared_edges: Sequence[int], seed: int
) -> dict[str, Float[np.ndarray, "2 draws"]]:
    """Share and Jaccard of each part between random circuits of these sizes, which share so many edges."""
    generator = np.random.default_rng(seed)

    def shared(total: int, *sizes: float) -> np.ndarray:
        a, b = map(round, sizes)
        return generator.hypergeometric(a, total - a, b, _NODE_DRAWS)

    heads = shared(graph.n_layers * graph.n_heads, float(left[2]), float(right[2]))
    mlps = shared(graph.n_layers, float(left[1] - left[2]), float(right[1] - right[2]))
    counts = {"edges": np.array(shared_edges), "nodes": heads + mlps, "heads": heads}
    found = {}
    for part, a, b in zip(PARTS, map(float, left), map(float, right), strict=True):
        both = counts[part]
        found[part] = np.stack([both / max(1.0, b), both / np.maximum(1.0, a + b - both)])
    return found
