"""How good is a consensus circuit, by its confidence, on facts that no draw has seen.

With a high confidence few edges are left, with a low one many that single draws found by chance. **Cross-fitted**: the
consensus of one half of the facts is tested on the other half, so that every fact of D_val is answered by a circuit
that was found without it; and the consensus of all of them is tested on D_test. Beside each stand random connected
circuits of the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from kcwb.circuits.ablation import AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import CONFIDENCES, Ensemble
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, DataError
from kcwb.evaluation.completeness import answered, cuts_of, summarised
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed, Share
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task
from kcwb.verbs import verb

_CROSS, _TEST = "D_val, cross-fitted", "D_test"


@verb
def confidence_curve(
    model: Model,
    ensemble: Ensemble,
    task: Task,
    *,
    confidences: Sequence[Share] = CONFIDENCES,
    ablation: str | AblationKind | None = None,
    k: Count = 10,
    draws: Natural = 3,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Size, Hit@k and loss of the consensus circuit at each confidence.

    Parameters
    ----------
    model, ensemble, task
        The task that the ensemble was made on.
    confidences
        The least pi of an edge.
    ablation, k
        As in `kcwb.completeness`; the ablation is by default that of the ensemble.
    draws
        Random circuits of the same size beside each.
    seed
        Of those.
    progress
        Reported per circuit.

    Returns
    -------
    DataFrame
        One row per confidence, split and run: `confidence`; `split`, `D_val, cross-fitted` (if the ensemble has halves)
        and `D_test` (if the task has one); `run`, `consensus` or `random circuits`; `edges`, the mean of the two
        halves' where it is cross-fitted; `n`, how many facts; `k`; `hit`, the share of facts whose answer has rank k or
        better, with `low` and `high` (Wilson's interval of that share; of random circuits, whose mean it is, the
        bootstrap's); `nll`, nats.

    Raises
    ------
    CircuitError
        If the ensemble is of another model.
    DataError
        If the task lacks facts that the ensemble was made on, or there is nothing to test on.
    """
    if ensemble.graph != model.graph:
        raise CircuitError(f"The ensemble is of {ensemble.graph}; {model.name} has {model.graph}.")
    cuts = cuts_of(model, ensemble.consensus(1.0), task, ablation)
    tests: dict[str, list[tuple[Ensemble, Prompts]]] = {}
    if ensemble.halves:
        unseen = [cuts.usable(prompts) for prompts in reversed(_facts_of_halves(ensemble, task))]
        tests[_CROSS] = [*zip(ensemble.halves, unseen, strict=True)]
    if len(task.test):
        tests[_TEST] = [(ensemble, cuts.usable(task.test))]
    if not tests:
        raise DataError(
            "There are no facts to test on: the task has no D_test, and the ensemble no halves (discover_many(..., "
            "halves=True))."
        )
    rows, known = [], dict[tuple[bytes, int], tuple[Tensor, Tensor]]()
    total = len(confidences) * sum(map(len, tests.values())) * (1 + draws)
    with track(progress, total, "confidence curve") as step:

        def ask(circuits: Sequence[Circuit], parts: Sequence[tuple[Ensemble, Prompts]]) -> tuple[Tensor, Tensor]:
            """Hits and losses, end to end; what comes again, as at several confidences, is not run again."""
            found = []
            for circuit, (_, prompts) in zip(circuits, parts, strict=True):
                key = circuit.kept.numpy().tobytes(), id(prompts)
                if key not in known:
                    known[key] = answered(model, circuit, prompts, cuts, k)
                found.append(known[key])
                step()
            hits, losses = zip(*found, strict=True)
            return torch.cat(hits), torch.cat(losses)

        for confidence in confidences:
            for split, parts in tests.items():
                circuits = [of.consensus(confidence) for of, _ in parts]
                edges = sum(circuit.n_edges for circuit in circuits) / len(circuits)
                one = {"confidence": confidence, "split": split}
                alone = summarised(*ask(circuits, parts), k)
                rows.append({**one, "run": "consensus", "edges": edges, **alone})
                if draws:
                    others = ([_random(circuit, seed + draw) for circuit in circuits] for draw in range(draws))
                    drawn = [ask(some, parts) for some in others]
                    hits, losses = (torch.stack(column).mean(0) for column in zip(*drawn, strict=True))
                    chance = summarised(hits, losses, k, seed)
                    rows.append({**one, "run": "random circuits", "edges": edges, **chance})
    return pd.DataFrame(rows)


def _random(circuit: Circuit, seed: int) -> Circuit:
    return random_circuit(circuit.graph, circuit.n_edges, seed) if circuit.n_edges else circuit


def _facts_of_halves(ensemble: Ensemble, task: Task) -> tuple[Prompts, Prompts]:
    """The prompts of each half's facts; DataError if the task has not all of them."""
    rows = {(fact.subject, fact.object): i for i, fact in enumerate(task.val.facts)}
    facts, halves = ensemble.provenance.get("facts"), ensemble.provenance.get("halves")
    try:
        found = [[rows[tuple(facts[i])] for i in half] for half in halves]  # type: ignore[index, union-attr]
        if len(found) != 2 or not all(found) or set(found[0]) & set(found[1]):
            raise ValueError("its halves are none")
        return task.val.select(found[0]), task.val.select(found[1])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(
            "The facts that the ensemble was made on are not all in D_val of this task, so that it cannot be "
            f"cross-fitted ({error}). Make the task as it was: relation, template, n and seed stand in its provenance."
        ) from error
