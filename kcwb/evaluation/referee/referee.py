"""The referee: is this a circuit? Every question that can be asked of one, on facts that it was not found on.

Each question is a claim that a paper would make of its circuit. A test in each direction answers it (`hypotheses`), and
Holm's correction over all of them together keeps the chance of any wrong answer at 5%. What the tests are of:

- the circuit and the model (equivalence), what is left without the circuit and the model (independence);
- random connected circuits of its size (sufficiency), and what is left without such ones (partial necessity);
- edges of random paths (minimality);
- other ablations, facts, templates, relations, and other circuits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kcwb.circuits.ablation import AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.run import check_same_model
from kcwb.errors import CircuitError, DataError, choose, warn
from kcwb.evaluation.referee.hearing import Effort, Hearing, subjects_of
from kcwb.evaluation.referee.judgement import Judgement
from kcwb.files import user_folder, write_text
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Natural, Seed, Share
from kcwb.tasks.metrics import METRICS
from kcwb.tasks.relations import Relation, load_relation
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

_VERSION = 4  # of what is asked; a kept judgement of another one is not read
FULL = Effort()
QUICK = Effort(12, 5, 30, 62, 62, 30, 1, 1, 12, again=False)


@verb
def referee(
    model: Model,
    circuit: Circuit | Ensemble,
    task: Task,
    *,
    ablation: str | AblationKind | None = None,
    metric: str = "nll",
    confidence: Share = 0.5,
    quick: bool = False,
    facts: Count | None = None,
    draws: Count | None = None,
    relations: Natural | Sequence[Relation | str] | None = None,
    exclude: Sequence[str] = (),
    seed: Seed = 0,
    cache: bool = True,
    progress: Progress = True,
) -> Judgement:
    """Judge a circuit: does it answer as the model does, alone, without idle edges, and elsewhere too.

    Parameters
    ----------
    model, circuit, task
        A circuit of the model, from wherever; of an ensemble its consensus. It is judged on the facts of the task's
        relation that the model knows and that it was not found on, in the task's template.
    ablation
        What cut edges deliver; None for what the circuit was found with (`zero` if that is not known).
    metric
        The loss that the shares in `matrix`, `elsewhere` and `rivals` are of, and the cost of edges: `nll` or
        `logit_diff`. The questions of arXiv 2410.13032 are asked in both.
    confidence
        Of an ensemble: the least pi of an edge.
    quick
        Fewer facts and draws, and no search under other ablations: a look, with less power.
    facts, draws
        At most how many facts (100; quick: 12), and how many random circuits, complements and paths each (100, 70, 100;
        quick: 62, 62, 30). Fewer than 60 cannot show that random ones are beaten. What is compared with them is
        compared on 24 of the facts (quick: 5), since these tests are over random draws, not over facts.
    relations
        How many other relations of those that come with the package are tried (3; quick: 1), or which.
    exclude
        Subjects of further facts that it is not to be judged on.
    seed
        Of all draws.
    cache
        Keep the judgement in the user's cache, and read it from there if the same was asked before.
    progress
        Reported per run of a circuit; may cancel there.

    Returns
    -------
    Judgement
        Tables, and a sentence for each question.

    Raises
    ------
    CircuitError
        If the circuit is empty or whole, or belongs to another model.
    DataError
        If there are fewer than 4 facts to judge it on, nothing to be gained on them, or no such relation.
    """
    if isinstance(circuit, Ensemble):
        circuit = circuit.consensus(confidence)
    choose("The metric", metric, [one for one in METRICS if one != "kl"])
    check_judged(model, circuit)
    check_same_weights(model, task)
    effort = QUICK if quick else FULL
    effort = replace(effort, facts=facts or effort.facts)
    effort = replace(effort, paths=draws, circuits=draws, complements=draws) if draws else effort
    others = effort.relations if relations is None else relations
    if not isinstance(others, int):
        others = [load_relation(one) if isinstance(one, str) else one for one in others]
    cuts = make_ablation(model, task, ablation or circuit.ablation)
    settings = {"ablation": str(cuts.kind), "metric": metric, "seed": seed, **vars(effort)}
    path = _kept_at(model, circuit, task, settings, others, exclude) if cache else None
    if path is not None and path.is_file():
        try:
            return Judgement.from_json(path.read_text(encoding="utf-8"))
        except (OSError, DataError, UnicodeDecodeError):  # damaged: it is made anew
            pass
    found = Hearing(model, circuit, task, cuts, metric, effort, others, exclude, seed).judge(progress, settings)
    if path is not None:
        try:
            write_text(path, found.to_json())
        except OSError as error:
            warn(f"The judgement cannot be kept as {path} ({error.strerror}).")
    return found


def check_judged(model: Model, circuit: Circuit) -> None:
    """Refuse a circuit that is empty or whole, or belongs to another model; CircuitError."""
    check_same_model(model, circuit)
    if not 0 < circuit.n_edges < model.graph.n_edges:
        raise CircuitError(f"{circuit!r} has {'no' if not circuit.n_edges else 'every'} edge: nothing to judge.")


def _kept_at(
    model: Model, circuit: Circuit, task: Task, settings: Mapping[str, Any], others: int | Sequence[Relation],
    exclude: Sequence[str],
) -> Path:  # fmt: skip
    """Where a judgement is kept, by what determines it."""
    scores, seen = circuit.scores, subjects_of(circuit, task)
    what = {
        "version": _VERSION, "model": model.digest, "dtype": str(model.dtype), "prepend_bos": model.prepend_bos,
        "circuit": circuit.digest,
        "scores": None if scores is None else hashlib.sha256(scores.numpy().tobytes()).hexdigest(),
        "from": [circuit.provenance.get(key) for key in ("method", "metric", "facts", "parameters")],
        "relation": task.relation.digest, "template": task.template, "n": task.n, "task seed": task.seed,
        "prompts": [task.val.own, task.reference.own],
        "others": others if isinstance(others, int) else [one.digest for one in others],
        "seen": sorted(seen), "exclude": sorted({*exclude} - seen), **settings,
    }  # fmt: skip
    return user_folder("judgements") / f"{hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()}.json"
