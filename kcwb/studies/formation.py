"""How a circuit forms while a model is trained: when facts are known, when movers appear, when the last circuit works.

After DynamicKnowledgeCircuits (arXiv 2502.11196), for any series of checkpoints: the small world's
(`kcwb.world.train_world(checkpoints=...)`) or those that a hub keeps as revisions of one model. The last one says which
facts are asked, and at each the same facts are asked again:

- do its weights **know** them (Hit@k of the full model on D_test);
- the circuit that is found **in these weights**, and the **last** one's edges run in them: what each answers alone, and
  recovers of what the model gains over nothing (faithfulness, of the loss), beside random circuits of the size;
- the **IoU** of the two, beside that of a random circuit with the last one: the structure may be there before it
  works, or change while the answers stay;
- **movers**: heads that bring the answer from the subject (`kcwb.reading.roles`), and how many of the last ones already
  do.

One series is one run of training, so that its numbers have no interval; those are over series of other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.methods import check_size
from kcwb.errors import DataError, ModelError, SettingError
from kcwb.evaluation.completeness import answered
from kcwb.evaluation.faithfulness import LEAST_GAIN, recovered_share
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.roles import head_roles
from kcwb.settings import Count, Natural, Seed
from kcwb.studies.fact_circuits import require_connected
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, ask_again, make_task
from kcwb.verbs import verb


@verb
def over_training(
    load: Callable[[str], Model],
    revisions: Sequence[str],
    relations: Sequence[Relation | str],
    *,
    edges: Count = 300,
    n: Count = 8,
    n_test: Natural | None = None,
    k: Count = 10,
    draws: Count = 5,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Look at one model after some numbers of training steps.

    Parameters
    ----------
    load
        Loads one of the checkpoints by its name, for example `lambda name: load_model("EleutherAI/pythia-160m",
        revision=name)`. One is held at a time, the last one first.
    revisions
        Their names in the order of training; the last is the one whose facts and circuits the others are compared with.
    relations
        What is asked.
    edges
        About how many edges the circuits have.
    n, n_test
        As in `make_task`, with the last checkpoint.
    k
        An answer counts from rank k on.
    draws
        Random circuits beside each.

    Returns
    -------
    DataFrame
        One row per revision and relation: `revision`, `relation`, `facts` (of D_test); `known`, the model's Hit@k;
        `hit`, `hit_last`, `hit_random`, those of the circuit found in these weights, of the last one's edges, and the
        mean of random ones; `faithfulness`, `faithfulness_last`, `faithfulness_random` (NaN where the model gains
        nothing over nothing); `iou` and `iou_random`; `movers`, how many heads are, `D_S`, what they write together
        from the subject (logits), and `movers_last`, the share of the last one's movers that are movers already (NaN if
        it has none).

    Raises
    ------
    SettingError
        If there are fewer than two revisions or no relation, or the graph has fewer edges.
    DataError
        If the last checkpoint knows none of a relation's facts.
    CircuitError
        If its circuit falls apart: its strongest edges are not connected.
    ModelError
        If a checkpoint has another shape than the last, or cannot be loaded.
    """
    if len(revisions) < 2 or not relations:
        raise SettingError(f"{len(revisions)} revisions, {len(relations)} relations: give at least two, and one.")
    last = load(revisions[-1])
    check_size(last.graph, edges, last.name)
    found = {}
    for relation in relations:
        task = make_task(last, relation, n=n, n_test=n_test, seed=seed)
        if not len(task.test):
            raise DataError(f"{task.relation.name} has no fact for D_test: take a smaller n.")
        circuit = _circuit(last, task, edges)
        require_connected(circuit, task.relation.name, edges, ", more steps, or more facts")
        found[task.relation.name] = task, circuit, _movers(last, task, seed)
    graph, rows = last.graph, {}
    with track(progress, len(set(revisions)) * len(found), "checkpoints") as step:

        def look(model: Model, revision: str) -> None:
            if model.graph != graph:
                raise ModelError(f"The checkpoint {revision!r} has another shape than {revisions[-1]!r}.")
            rows[revision] = []
            for name, (task, circuit, movers) in found.items():
                here = ask_again(model, task)
                row = {"revision": revision, "relation": name, "facts": len(here.test)}
                rows[revision].append(row | _row(model, here, circuit, movers, edges, k, draws, seed))
                step(note=f"{revision}, {name}")

        look(last, revisions[-1])
        del last  # before another is loaded
        for revision in revisions:
            if revision not in rows:
                look(load(revision), revision)
    return pd.DataFrame([row for revision in revisions for row in rows[revision]])


def _circuit(model: Model, task: Task, edges: int) -> Circuit:
    found = discover(model, task, edges=edges, ablation="mean", progress=False)
    return Circuit(model.graph, found.kept)  # without its origin: it is run in other weights too


def _movers(model: Model, task: Task, seed: int) -> pd.DataFrame:
    """The model's mover heads and what they write."""
    table = head_roles(model, None, task, shuffles=50, resamples=1, seed=seed, progress=False)
    return table[table["role"] == "mover"].set_index("node")


def _row(
    model: Model, task: Task, last: Circuit, movers: pd.DataFrame, edges: int, k: int, draws: int, seed: int
) -> dict[str, Any]:
    """What the module's text says, of one checkpoint and relation."""
    own, mine = _circuit(model, task, edges), _movers(model, task, seed)
    cuts = make_ablation(model, task, "mean")
    random = [random_circuit(model.graph, last.n_edges, seed + draw) for draw in range(draws)]

    def ask(circuit: Circuit | None) -> tuple[np.ndarray, np.ndarray]:
        hits, losses = answered(model, circuit, task.test, cuts, k)
        return hits.numpy(), losses.numpy()

    known, full = ask(None)
    empty = ask(Circuit.empty(model.graph))[1]
    possible = empty - full
    told = float(possible.mean()) > LEAST_GAIN
    hits, shares = {}, {}
    for ending, circuits in {"": [own], "_last": [last], "_random": random}.items():
        hit, losses = (np.mean(column, 0) for column in zip(*map(ask, circuits), strict=True))
        hits[f"hit{ending}"] = hit.mean()
        shares[f"faithfulness{ending}"] = float(recovered_share(empty - losses, possible)) if told else np.nan
    kept = len(mine.index.intersection(movers.index)) / len(movers) if len(movers) else np.nan
    return {
        "known": known.mean(), **hits, **shares,
        "iou": own.iou(last), "iou_random": np.mean([one.iou(last) for one in random]),
        "movers": len(mine), "D_S": mine["D_S"].sum(), "movers_last": kept,
    }  # fmt: skip
