"""The circuits of both hops, of the two-hop question and of controls, all at one size and on the same chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, ablation_kind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.methods import check_method, check_size
from kcwb.discovery.selection import matched_circuit
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count
from kcwb.studies.fact_circuits import found_with, require_connected, scores_by_fact
from kcwb.tasks.hops import HOPS, Hops
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

#: The union of the two hops' circuits.
INTEGRATED = "integrated"


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
    ablation: str | AblationKind | None = None,
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

    Raises
    ------
    DataError
        Under `resample`, if no chain has a partner in all three tasks.
    CircuitError
        If a circuit falls apart: its strongest edges are not connected.
    """
    controls = dict(controls or {})
    settled = check_method("eap-ig", metric, ablation, steps=steps)
    ablation, steps = settled.ablation, int(settled.settings["steps"])
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
            each, cuts = partial(step, note=name), make_ablation(model, task, ablation)
            scores[name] = scores_by_fact(model, task, chosen[name], cuts, metric, steps, each)
            made = []
            for one in scores[name]:
                made.append(matched_circuit(model.graph, one, edges))
                each()
            of_fact[name] = made if name in HOPS else [made[i % len(made)] for i in range(len(rows))]
            about = found_with(model, task, task.val.facts, metric, ablation, edges, steps)
            circuits[name] = replace(matched_circuit(model.graph, scores[name].mean(0), edges), provenance=about)
            require_connected(circuits[name], name, edges, ", more steps, or more chains")
            each()
    circuits[INTEGRATED] = circuits["hop 1"] | circuits["hop 2"]
    of_fact[INTEGRATED] = [one | two for one, two in zip(of_fact["hop 1"], of_fact["hop 2"], strict=True)]
    settings: dict[str, object] = {"edges": edges, "metric": metric, "ablation": ablation, "steps": steps}
    return HopCircuits(hops, circuits, of_fact, scores, controls, settings)


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
    if not ablation_kind(ablation).paired:
        return every
    paired = torch.stack([task.val.paired for task in hops.tasks.values()]).all(0).tolist()
    rows = [i for i in every if paired[i]]
    if not rows:
        raise DataError(
            f"{ablation} ablation needs a partner of as many tokens for each question of a chain; no chain has all "
            "three. Use mean ablation."
        )
    return rows


def _own(task: Task, ablation: str) -> list[int]:
    """The rows of a control's D_val on which an ablation is defined."""
    needed = ablation_kind(ablation).paired
    rows = [i for i, paired in enumerate(task.val.paired.tolist()) if paired or not needed]
    if not rows:
        raise DataError(
            f"{ablation} ablation: no fact of the control {task.relation.name} has a partner. Leave it out."
        )
    return rows
