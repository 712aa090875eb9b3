"""How good is a consensus circuit, by its confidence, on facts that no draw has seen.

With a high confidence few edges are left, with a low one many that single draws found by chance. **Cross-fitted**: the
consensus of one half of the facts is tested on the other half, so that every fact of D_val is answered by a circuit
that was found without it; and the consensus of all of them is tested on D_test. Beside each stand random connected
circuits of the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import CONFIDENCES, Ensemble
from kcwb.circuits.run import check_same_model
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, DataError
from kcwb.evaluation.completeness import answered, summarised
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed, Share
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
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
        halves' where it is cross-fitted; `n`, how many facts; `hit`, the share of facts whose answer has rank k or
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
    check_same_model(model, ensemble.consensus(1.0))
    check_same_weights(model, task)
    cuts = make_ablation(model, task, ablation or str(ensemble.provenance.get("ablation", "zero")))
    tests: dict[str, list[tuple[Ensemble, Prompts]]] = {}
    if ensemble.halves:
        first, second = _facts_of_halves(ensemble, task)
        tests[_CROSS] = [(ensemble.halves[0], second), (ensemble.halves[1], first)]
    if len(task.test):
        tests[_TEST] = [(ensemble, cuts.usable(task.test))]
    if not tests:
        raise DataError(
            "There are no facts to test on: the task has no D_test, and the ensemble no halves (discover_many(..., "
            "halves=True))."
        )
    each = _Answers(model, cuts, k)
    rows = []
    total = len(confidences) * sum(map(len, tests.values())) * (1 + draws)
    with track(progress, total, "confidence curve") as step:
        for confidence in confidences:
            for split, parts in tests.items():
                circuits = [(of.consensus(confidence), prompts) for of, prompts in parts]
                edges = sum(circuit.n_edges for circuit, _ in circuits) / len(circuits)
                one = {"confidence": confidence, "split": split}
                alone = _together([each(circuit, prompts, step) for circuit, prompts in circuits])
                rows.append({**one, "run": "consensus", "edges": edges} | summarised(*alone, None))
                if draws:
                    drawn = []
                    for draw in range(draws):
                        others = [(_random(circuit, seed + draw), prompts) for circuit, prompts in circuits]
                        drawn.append(_together([each(circuit, prompts, step) for circuit, prompts in others]))
                    hits, losses = (torch.stack(column).mean(0) for column in zip(*drawn, strict=True))
                    rows.append({**one, "run": "random circuits", "edges": edges} | summarised(hits, losses, seed))
    return pd.DataFrame(rows)


class _Answers:
    """What circuits answer; a circuit that comes again, as at several confidences, is not run again."""

    def __init__(self, model: Model, cuts: Ablation, k: int) -> None:
        self._model, self._cuts, self._k = model, cuts, k
        self._before: dict[tuple[bytes, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, circuit: Circuit, prompts: Prompts, step: Callable[..., None]) -> tuple[Tensor, Tensor]:
        key = circuit.kept.numpy().tobytes(), id(prompts)
        if key not in self._before:
            self._before[key] = answered(self._model, circuit, prompts, self._cuts, self._k)
        step()
        return self._before[key]


def _together(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    hits, losses = zip(*parts, strict=True)
    return torch.cat(hits), torch.cat(losses)


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
