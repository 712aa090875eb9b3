"""Do two hops use the circuits of each: how much of them the two-hop circuit has.

Knowledge Circuits (arXiv 2405.17969) compares the circuit of a two-hop question with those of its hops by the share
|two-hop and single| / |single| of nodes and of edges. Here the circuits of hop 1, hop 2 and the two-hop question are
cut at the same size, each on the same chains; **integrated** is the union of the two hops' circuits. Such a share says
nothing alone. Beside it stand random connected circuits of the same size (nodes: as many heads and as many MLPs), which
any two real circuits beat, since all pass through the same late layers; and the circuits of other tasks (`controls`),
which is the comparison that can fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.methods import check_method, check_size
from kcwb.discovery.selection import matched_circuit, select_edges
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import mean_interval, p_value
from kcwb.tasks.hops import HOPS, Hops
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import Task, check_same_weights
from kcwb.verbs import verb
from kcwb.versions import versions

INTEGRATED = "integrated"
PARTS = ("edges", "nodes", "heads")
_NODE_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class HopCircuits:
    """The circuits of both hops, of the two-hop question and of controls; made by `hop_circuits`.

    Attributes
    ----------
    hops
        What they were found on.
    circuits
        `hop 1`, `hop 2`, `two-hop`, `integrated`, and the controls by name: each of all chains together.
    of_fact
        The same for each chain alone. A control has as many, of its own facts in turn.
    scores
        Name -> `[N, S, R]`, each chain's scores, from which the circuits were cut (not for `integrated`).
    controls
        The controls' tasks.
    settings
        The parameters of `hop_circuits`.
    """

    hops: Hops
    circuits: dict[str, Circuit]
    of_fact: dict[str, list[Circuit]]
    scores: dict[str, Float[Tensor, "N S R"]]
    controls: dict[str, Task]
    settings: dict[str, object]

    @property
    def singles(self) -> list[str]:
        """The circuits that the two-hop circuit is compared with."""
        return ["hop 1", "hop 2", INTEGRATED, *self.controls]


@verb
def hop_circuits(
    model: Model,
    hops: Hops,
    *,
    controls: Mapping[str, Task] | None = None,
    edges: Count = 300,
    metric: str = "nll",
    ablation: str | None = None,
    steps: Count | None = None,
    progress: Progress = True,
) -> HopCircuits:
    """Find the circuits of both hops and of the two-hop question, all at one size.

    Parameters
    ----------
    model, hops
        Circuits are found on D_val.
    controls
        Tasks that have nothing to do with the hops, by name: what their circuits share with the two-hop circuit is
        shared by all.
    edges
        How many edges a circuit has once dangling ones are dropped, as nearly as scores allow.
    metric, ablation, steps
        As in `kcwb.discover`, of EAP-IG (`steps=1`: EAP).
    progress
        Reported per fact that is scored, and per circuit.

    Raises
    ------
    DataError
        Under `resample`, if no chain has a partner in all three tasks.
    CircuitError
        If a circuit falls apart: its strongest edges are not connected.
    SettingError
        If a setting cannot be meant.
    """
    controls = dict(controls or {})
    settled = check_method("eap-ig", metric, ablation, steps=steps)
    ablation, steps = settled.ablation, settled.steps
    _check(model, hops, controls, edges)
    tasks = {**hops.tasks, **controls}
    rows = usable_chains(hops, ablation)
    chosen = {name: list(rows) if name in HOPS else _own(task, ablation) for name, task in tasks.items()}
    different = sum(len({tasks[name].val.facts[i] for i in some}) for name, some in chosen.items())
    scores: dict[str, Tensor] = {}
    of_fact: dict[str, list[Circuit]] = {}
    circuits: dict[str, Circuit] = {}
    with track(progress, different + sum(len(some) + 1 for some in chosen.values()), "circuits") as step:
        for name, task in tasks.items():
            cuts = make_ablation(model, task, ablation)
            loss, known = make_loss(model, task.val, metric), {}
            for i in chosen[name]:
                fact = task.val.facts[i]
                if fact not in known:
                    known[fact] = attribution_scores(model, loss.select([i]), cuts, steps=steps)
                    step(note=name)
            scores[name] = torch.stack([known[task.val.facts[i]] for i in chosen[name]])
            made = []
            for each in scores[name]:
                made.append(matched_circuit(model.graph, each, edges))
                step(note=name)
            of_fact[name] = made if name in HOPS else [made[i % len(made)] for i in range(len(rows))]
            found = _provenance(model, task, edges, metric, ablation, steps)
            circuits[name] = replace(matched_circuit(model.graph, scores[name].mean(0), edges), provenance=found)
            if not circuits[name].n_edges:
                raise CircuitError(
                    f"The strongest edges of {name} are not connected: no circuit of about {edges} edges is left once "
                    "dangling ones are dropped. Ask for more edges, more steps, or more chains."
                )
            step(note=name)
    circuits[INTEGRATED] = circuits["hop 1"] | circuits["hop 2"]
    of_fact[INTEGRATED] = [one | two for one, two in zip(of_fact["hop 1"], of_fact["hop 2"], strict=True)]
    settings: dict[str, object] = {"edges": edges, "metric": metric, "ablation": ablation, "steps": steps}
    return HopCircuits(hops, circuits, of_fact, scores, controls, settings)


@verb
def hop_overlap(
    found: HopCircuits, *, draws: Count = 20, resamples: Count = 100, seed: Seed = 0, progress: Progress = True
) -> pd.DataFrame:
    """How much of each circuit the two-hop circuit has, beside chance and controls.

    Parameters
    ----------
    found
        The circuits.
    draws
        Pairs of random connected circuits of the same two sizes. Random sets of nodes, with as many heads and as many
        MLPs, are drawn 1,000 times.
    resamples
        Bootstrap resamples of the chains, for the interval of all facts together.
    seed
        Of both.
    progress
        Reported per resample and per random circuit.

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
    graph, rows = found.circuits["two-hop"].graph, []
    n_facts = len(found.of_fact["two-hop"])
    parts: dict[str, dict[str, list[_Parts]]] = {
        "one fact": {name: [_parts(one) for one in some] for name, some in found.of_fact.items()},
        "all facts": {name: [_parts(one)] for name, one in found.circuits.items()},
    }
    sizes = {
        (level, name): np.mean([_sizes(one) for one in some], axis=0)
        for level, circuits in parts.items()
        for name, some in circuits.items()
    }
    pools = {(name != "two-hop", round(float(size[0]))) for (_, name), size in sizes.items()}
    with track(progress, resamples + draws * len(pools), "overlap") as step:
        again = []
        for counts in np.random.default_rng(seed).multinomial(n_facts, np.full(n_facts, 1 / n_facts), resamples):
            again.append(_resampled(found, counts))
            step(note="resamples")
        random: dict[tuple[bool, int], list[Tensor]] = {}
        for single, size in sorted(pools):  # one seed never serves both sides of a pair
            random[single, size] = []
            for draw in range(draws):
                random[single, size].append(random_circuit(graph, size, seed + 2 * draw + single).kept)
                step(note="random circuits")
    for level, circuits in parts.items():
        for name in found.singles:
            own = np.array([_overlap(*pair) for pair in zip(circuits["two-hop"], circuits[name], strict=True)])
            spread = own if level == "one fact" else np.array([_overlap(one["two-hop"], one[name]) for one in again])
            left, right = sizes[level, "two-hop"], sizes[level, name]
            pairs = zip(random[False, round(float(left[0]))], random[True, round(float(right[0]))], strict=True)
            chance = _chance(graph, left, right, [int((a & b).sum()) for a, b in pairs], seed + len(rows))
            for i, part in enumerate(PARTS):
                rows.append(
                    {"level": level, "circuit": name, "part": part}
                    | _beside(own[:, i], spread[:, i], chance[part], level, seed)
                    | {"size_two_hop": left[i], "size": right[i], "facts": n_facts}
                )
    return pd.DataFrame(rows)


# --- circuits ---


def _check(model: Model, hops: Hops, controls: Mapping[str, Task], edges: int) -> None:
    check_size(model.graph, edges, model.name)
    taken = {*HOPS, INTEGRATED} & set(controls)
    if taken:
        raise SettingError(f"A control cannot be named {min(taken)!r}: a circuit of the hops is.")
    for task in (*hops.tasks.values(), *controls.values()):
        check_same_weights(model, task)


def usable_chains(hops: Hops, ablation: str) -> Sequence[int]:
    """The rows of D_val on which an ablation is defined in all three tasks."""
    every = range(len(hops.chains))
    if ablation != "resample":
        return every
    paired = torch.stack([task.val.paired for task in hops.tasks.values()]).all(0).tolist()
    rows = [i for i in every if paired[i]]
    if not rows:
        raise DataError(
            "resample ablation needs a partner of as many tokens for each question of a chain; no chain has all three. "
            "Use mean ablation."
        )
    return rows


def _own(task: Task, ablation: str) -> list[int]:
    """The rows of a control's D_val on which an ablation is defined."""
    rows = [i for i, paired in enumerate(task.val.paired.tolist()) if paired or ablation != "resample"]
    if not rows:
        raise DataError(f"resample ablation: no fact of the control {task.relation.name} has a partner. Leave it out.")
    return rows


def _provenance(model: Model, task: Task, edges: int, metric: str, ablation: str, steps: int) -> dict[str, object]:
    return {
        "model": {
            "name": model.name,
            "digest": model.digest,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "relation": {"name": task.relation.name, "digest": task.relation.digest},
        "template": task.template,
        "n": task.n,
        "seed": task.seed,
        "facts": [[fact.subject, fact.object] for fact in task.val.facts],
        "method": "eap-ig" if steps > 1 else "eap",
        "metric": metric,
        "ablation": ablation,
        "parameters": {"edges": edges, "select": "signed", "steps": steps},
        "versions": versions(),
    }


def _resampled(found: HopCircuits, counts: np.ndarray) -> dict[str, _Parts]:
    """The parts of the circuits of resampled chains, cut where those of all chains were."""
    made: dict[str, Circuit] = {}
    for name, scores in found.scores.items():
        if name in HOPS:
            share = torch.from_numpy(counts / counts.sum()).float()
            mean = torch.tensordot(share, scores, 1)
            made[name] = _cut_alike(found.circuits[name], mean)
        else:
            made[name] = found.circuits[name]
    made[INTEGRATED] = made["hop 1"] | made["hop 2"]
    return {name: _parts(one) for name, one in made.items()}


def _cut_alike(circuit: Circuit, scores: Float[Tensor, "S R"]) -> Circuit:
    """A circuit of other scores, of as many of the highest ones as were taken for this one."""
    assert circuit.scores is not None  # matched_circuit sets them
    least = circuit.scores[circuit.kept].min()
    asked = int((circuit.scores[circuit.graph.exists] >= least).sum())
    return Circuit(circuit.graph, select_edges(circuit.graph, scores, edges=asked)).without_dangling()


# --- overlap ---


_Parts = dict[str, np.ndarray]


def _parts(circuit: Circuit) -> _Parts:
    """Which edges, nodes (heads and MLPs) and heads a circuit has."""
    graph, matrix = circuit.graph, circuit.node_matrix
    inside = (matrix.sum(0) + matrix.sum(1) > 0)[1:-1]  # without input and logits
    heads = np.arange(len(inside)) % (graph.n_heads + 1) < graph.n_heads
    return {"edges": circuit.kept.numpy().ravel(), "nodes": inside, "heads": inside & heads}


def _sizes(parts: _Parts) -> list[int]:
    return [int(parts[part].sum()) for part in PARTS]


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
) -> dict[str, Float[np.ndarray, "draws 2"]]:
    """Share and Jaccard of each part between random circuits of these sizes, which share so many edges."""
    generator = np.random.default_rng(seed)
    counts = {"edges": np.array(shared_edges)}
    total = {"heads": graph.n_layers * graph.n_heads, "mlps": graph.n_layers}
    of_kind = {
        "heads": [round(float(side[2])) for side in (left, right)],
        "mlps": [round(float(side[1] - side[2])) for side in (left, right)],
    }
    drawn = {kind: generator.hypergeometric(a, total[kind] - a, b, _NODE_DRAWS) for kind, (a, b) in of_kind.items()}
    counts |= {"heads": drawn["heads"], "nodes": drawn["heads"] + drawn["mlps"]}
    found = {}
    for i, part in enumerate(PARTS):
        a, b = float(left[i]), float(right[i])
        both = counts[part]
        found[part] = np.stack([both / max(1.0, b), both / np.maximum(1.0, a + b - both)], axis=-1)
    return found


def _beside(
    own: Float[np.ndarray, "n 2"],
    spread: Float[np.ndarray, "m 2"],
    chance: Float[np.ndarray, "draws 2"],
    level: str,
    seed: int,
) -> dict[str, float]:
    """One row of the table: share and Jaccard with intervals, and chance."""
    row: dict[str, float] = {}
    for i, (name, prefix) in enumerate((("share", ""), ("jaccard", "jaccard_"))):
        if level == "one fact":
            low, high = mean_interval(own[:, i], seed)
        else:
            low, high = (float(x) for x in np.quantile(spread[:, i], [0.025, 0.975]))
        row |= {name: float(own[:, i].mean()), f"{prefix}low": low, f"{prefix}high": high}
    p = p_value(row["share"], chance[:, 0])
    row |= {"random": float(chance[:, 0].mean()), "p": p, "random_jaccard": float(chance[:, 1].mean())}
    return row
