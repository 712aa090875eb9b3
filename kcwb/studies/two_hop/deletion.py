"""Is the two-hop question answered through the first hop: what is lost without it.

The edges that the first hop's circuit has and the second's has not are cut out of the *whole* model. If the two-hop
question is answered through the first hop, its answer should go, while hop 2's, which names the bridge, should stay.
That alone proves little, since a long prompt may be the more fragile one: the same is done with random edges of the
same kind, and with the edges of other tasks' circuits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import mean_interval, p_value, proportion_interval
from kcwb.studies.two_hop.circuits import INTEGRATED, HopCircuits, usable_chains
from kcwb.tasks.hops import HOPS
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import check_same_weights
from kcwb.verbs import verb

#: The question whose cost is the two-hop question's less hop 2's.
DIFFERENCE = "two-hop less hop 2"


@verb
def delete_first_hop(
    model: Model,
    found: HopCircuits,
    *,
    draws: Count = 20,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Cut what the first hop's circuit has and the second's has not out of the model, and ask again.

    Parameters
    ----------
    model, found
        Cut edges deliver what the circuits' ablation says, each task its own.
    draws
        Random sets of as many edges, into the same receivers and from senders of the same kind, that neither hop's
        circuit has.

    Returns
    -------
    DataFrame
        One row per `cut` and question `asked`. The cuts: `hop 1 only`, the edges of hop 1's circuit without those of
        hop 2's; `hop 2 only`, the other way round, which should spoil hop 2; and each control's without those of both
        hops, the strongest of them, as many as in `hop 1 only` where there are as many. `edges`, how many; `facts`;
        `hit_before` and `hit`, the share of answers of rank k or better, its 95% Wilson interval (of the share of
        chains) `hit_low`, `hit_high`; `cost`, the increase of the answer's loss (nll, nats), with the 95% bootstrap
        interval of its mean over chains `low`, `high`; and for `hop 1
        only`, but for the question hop 1, `random_cost`, `random_hit` (means over draws) and `p`, the share of draws
        (itself counted in) that cost as much. The question `two-hop less hop 2` holds the difference of the costs,
        chain by chain.
    """
    for task in found.hops.tasks.values():
        check_same_weights(model, task)
    cuts = _cuts(found)
    if not len(cuts["hop 1 only"]):
        raise DataError(
            "Hop 2's circuit holds all of hop 1's: there is no edge to delete. Ask for circuits of more edges."
        )
    random = _random_edges(found, cuts["hop 1 only"], draws, seed)
    ablation = str(found.settings["ablation"])
    rows = list(usable_chains(found.hops, ablation))
    asked = {
        name: (task.val.select(rows), make_ablation(model, task, ablation)) for name, task in found.hops.tasks.items()
    }
    nulls = HOPS[1:]  # whether hop 1 feels random edges is not the question
    total = len(HOPS) * (1 + len(cuts)) + len(nulls) * draws
    with track(progress, total, "deletion") as step:

        def run(edges: Sequence[tuple[int, int]], questions: Sequence[str] = HOPS) -> dict[str, np.ndarray]:
            scored = {}
            for name in questions:
                prompts, values = asked[name]
                scored[name] = _score(model, prompts, values, edges, found.hops.k)
                step(note=name)
            return scored

        before = run([])
        after = {name: run(edges) for name, edges in cuts.items()}
        chance = [run(edges, nulls) for edges in random]
    table = []
    for name, edges in cuts.items():
        for question in (*HOPS, DIFFERENCE):
            compared = name == "hop 1 only" and question != "hop 1"
            said = _costs(before, after[name], chance if compared else [], question, seed)
            table.append({"cut": name, "edges": len(edges), "asked": question, "facts": len(rows), **said})
    return pd.DataFrame(table)


def _cuts(found: HopCircuits) -> dict[str, list[tuple[int, int]]]:
    """What is cut, by name: edges as (row, column)."""
    one, two = found.circuits["hop 1"], found.circuits["hop 2"]
    cuts = {"hop 1 only": _strongest(one - two), "hop 2 only": _strongest(two - one)}
    for name in found.controls:
        rest = replace(found.circuits[name] - one - two, scores=found.circuits[name].scores)
        cuts[f"{name} only"] = _strongest(rest)[: len(cuts["hop 1 only"])]
    return cuts


def _strongest(circuit: Circuit) -> list[tuple[int, int]]:
    return [circuit.graph.edge_index(f"{edge.sender}->{edge.receiver}") for edge in circuit.edges.itertuples()]


def _random_edges(
    found: HopCircuits, cut: Sequence[tuple[int, int]], draws: int, seed: int
) -> list[list[tuple[int, int]]]:
    """Sets of edges into the same receivers from other senders of the same kind, where there are any left."""
    graph = found.circuits["hop 1"].graph
    taken = found.circuits[INTEGRATED].kept
    kinds = np.array([graph.node(name).kind for name in graph.sender_names])
    generator = np.random.default_rng(seed)
    sets = []
    for _ in range(draws):
        free: Bool[np.ndarray, "S R"] = (graph.exists & ~taken).numpy().copy()
        chosen = []
        for row, column in cut:
            pool = np.flatnonzero(free[:, column] & (kinds == kinds[row]))
            pool = pool if len(pool) else np.flatnonzero(free[:, column])
            if len(pool):
                sender = int(generator.choice(pool))
                free[sender, column] = False
                chosen.append((sender, column))
        sets.append(chosen)
    return sets


def _score(
    model: Model, prompts: Prompts, ablation: Ablation, edges: Sequence[tuple[int, int]], k: int
) -> Float[np.ndarray, "2 N"]:
    """Loss, and whether the answer is right, of each prompt with some edges cut out of the model."""
    kept = None
    if edges:
        kept = model.graph.exists.clone()
        rows, columns = zip(*edges, strict=True)
        kept[list(rows), list(columns)] = False
    logits = run_circuit(model, kept, prompts, ablation)
    losses = make_loss(model, prompts, "nll").per_prompt(logits)
    return torch.stack([losses.double(), (answer_ranks(logits, prompts) <= k).double()]).cpu().numpy()


def _costs(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], chance: Sequence[Mapping[str, np.ndarray]],
    question: str, seed: int,
) -> dict[str, float]:  # fmt: skip
    """What a cut costs on one question, or on the two-hop question more than on hop 2."""
    asked = ("two-hop", "hop 2") if question == DIFFERENCE else (question,)

    def cost(scored: Mapping[str, np.ndarray]) -> np.ndarray:
        each = [(scored[name] - before[name])[0] for name in asked]
        return each[0] - each[1] if len(each) > 1 else each[0]

    own, null = cost(after), np.array([cost(one).mean() for one in chance])
    low, high = mean_interval(own, seed)
    row = {"cost": float(own.mean()), "low": low, "high": high}
    row |= dict.fromkeys(("hit_before", "hit", "hit_low", "hit_high"), math.nan)
    random_hit = math.nan
    if question != DIFFERENCE:
        right = after[question][1]
        low, high = proportion_interval(right)
        row |= {"hit_before": float(before[question][1].mean()), "hit": float(right.mean())}
        row |= {"hit_low": low, "hit_high": high}
        random_hit = float(np.mean([one[question][1].mean() for one in chance])) if chance else math.nan
    random_cost = float(null.mean()) if len(null) else math.nan
    return {**row, "random_cost": random_cost, "random_hit": random_hit, "p": p_value(own.mean(), null)}
