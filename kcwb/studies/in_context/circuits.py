"""A relation's circuits without and with a context, and which heads are new in the later one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.methods import METHODS, STEPS, check_size
from kcwb.discovery.selection import matched_circuit
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed, Share
from kcwb.studies.fact_circuits import (
    found_with,
    require_connected,
    resampled_circuit,
    resampled_weights,
    scores_by_fact,
    senders_in,
)
from kcwb.tasks.shots import ShotTask
from kcwb.tasks.task import check_same_weights
from kcwb.verbs import verb

#: In how many of the resamples a head must be new, or shared.
LEAST_PRESENCE = 0.8
_METRIC, _ABLATION = "nll", METHODS["eap-ig"].ablation


@dataclass(frozen=True, eq=False)
class ResampledCircuit:
    """A circuit, and which nodes are in the circuits of bootstrap resamples of its facts.

    Attributes
    ----------
    circuit
        That of all facts of D_val.
    presence
        `[draws, S]`: whether a sender has a kept edge in the circuit of a resample.
    """

    circuit: Circuit
    presence: Bool[np.ndarray, "draws S"]


@verb
def context_circuits(
    model: Model,
    tasks: Mapping[str, ShotTask],
    *,
    edges: Count = 300,
    steps: Count = STEPS,
    resamples: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> dict[str, ResampledCircuit]:
    """The circuits of tasks that ask the same facts, at one size, and of resamples of those facts.

    Edges are scored by EAP-IG on each fact alone; a resample's scores are the mean of its facts'. All tasks share the
    resamples.

    Parameters
    ----------
    model, tasks
        Name -> task, of `kcwb.tasks.shots.shot_tasks`.
    edges
        How many edges a circuit has once dangling ones are dropped (or the nearest number to it).
    steps
        Points of EAP-IG's integral.
    resamples
        Bootstrap resamples of D_val. Each keeps as many of its highest scores as the circuit of all facts does.

    Raises
    ------
    DataError
        If the tasks ask different facts, or a single one, which every resample would repeat.
    CircuitError
        If a circuit falls apart: its strongest edges are not connected.
    """
    check_size(model.graph, edges, model.name)
    facts = {task.val.facts for task in tasks.values()}
    n_facts = len(next(iter(facts), ()))
    if len(facts) != 1 or n_facts < 2:
        what = "ask different facts" if len(facts) > 1 else f"ask {n_facts} in D_val"
        raise DataError(f"The tasks {what}; circuits are compared on the same facts, two or more.")
    for task in tasks.values():
        check_same_weights(model, task)
    again, found = resampled_weights(n_facts, resamples, seed), {}
    with track(progress, n_facts * len(tasks), "circuits") as step:
        for name, task in tasks.items():
            cuts = make_ablation(model, task, _ABLATION)
            scores = scores_by_fact(
                model, task, range(n_facts), cuts, _METRIC, steps, lambda name=name: step(note=name)
            )
            circuit = matched_circuit(model.graph, scores.mean(0), edges)
            require_connected(circuit, name, edges, ", more steps, or more facts")
            shots = {"k": task.k, "kind": task.kind, "question": task.question}
            about = found_with(model, task, task.val.facts, _METRIC, _ABLATION, edges, steps, shots=shots)
            presence = np.stack([senders_in(resampled_circuit(circuit, scores, weights)) for weights in again])
            found[name] = ResampledCircuit(replace(circuit, provenance=about), presence)
    return found


@verb
def new_heads(before: ResampledCircuit, after: ResampledCircuit, least: Share = LEAST_PRESENCE) -> pd.DataFrame:
    """Which heads and MLPs a context brings into a circuit, keeps in it, and drives out of it.

    Parameters
    ----------
    before, after
        The circuits without and with the context, from the same call of `context_circuits`.
    least
        In what share of resamples a node must be new, shared or gone to be called so.

    Returns
    -------
    DataFrame
        One row per head or MLP of either circuit, in order: `node`, `kind`, `layer`, `head`; `before`, `after`: whether
        it is in the circuit of all facts; `in_before`, `in_after`: the share of resamples in whose circuits it is;
        `new`, `both`, `lost`: the share of resamples in which it is in the later circuit alone, in both, in the earlier
        one alone; `status`: `new`, `shared` or `gone` where the circuits of all facts say so and at least `least` of
        the resamples do, else `unsure`.

    Raises
    ------
    CircuitError
        If the circuits are of different graphs.
    SettingError
        If `least` is not a share, or the resamples are not the same.
    """
    if before.presence.shape[0] != after.presence.shape[0]:
        raise SettingError(
            f"{before.presence.shape[0]} and {after.presence.shape[0]} resamples: give circuits of one call of "
            "context_circuits."
        )
    graph = (before.circuit | after.circuit).graph  # raises where graphs differ
    own = [senders_in(one.circuit) for one in (before, after)]
    shares = {
        "new": (after.presence & ~before.presence).mean(0),
        "both": (after.presence & before.presence).mean(0),
        "lost": (before.presence & ~after.presence).mean(0),
    }
    said = {"new": ("new", ~own[0] & own[1]), "both": ("shared", own[0] & own[1]), "lost": ("gone", own[0] & ~own[1])}
    status = np.full(graph.n_senders, "unsure", dtype=object)
    for name, (word, holds) in said.items():
        status[holds & (shares[name] >= least)] = word
    places = [graph.node(name) for name in graph.sender_names]
    table = pd.DataFrame(
        {
            "node": graph.sender_names,
            **{name: [getattr(place, name) for place in places] for name in ("kind", "layer", "head")},
            **{"before": own[0], "after": own[1]},
            **{"in_before": before.presence.mean(0), "in_after": after.presence.mean(0)},
            **shares,
            "status": status,
        }
    )
    return table[(own[0] | own[1]) & (table["node"] != "input")].reset_index(drop=True)


def heads_with(nodes: pd.DataFrame, status: str) -> list[str]:
    """The attention heads of a table of `new_heads` that have a status."""
    return nodes.loc[(nodes["kind"] == "head") & (nodes["status"] == status), "node"].tolist()
