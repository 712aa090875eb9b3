"""All that is asked of one circuit: which facts, which runs, and the tests of what they give."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import found_with, record
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.selection import was_pruned
from kcwb.errors import DataError, choose
from kcwb.evaluation.referee import elsewhere as other
from kcwb.evaluation.referee import hypotheses as tests
from kcwb.evaluation.referee.judgement import Judgement
from kcwb.evaluation.referee.minimality import choose_edges, edge_changes, minimality_table
from kcwb.evaluation.referee.scores import Answered, Scores, metrics_of
from kcwb.evaluation.referee.words import ALPHA, questions_table
from kcwb.models.loading import Model
from kcwb.parallel import on_each_core
from kcwb.progress import Progress, track
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task
from kcwb.tasks.tokens import told_apart

#: Of what the model gains over nothing: a difference of scores that is no matter.
_TIE = 0.01
#: A test at a level, which its power depends on.
_Test = Callable[[float], tests.Tested]


@dataclass(frozen=True)
class Effort:
    """How much is run: facts; of them, those on which circuits and edges are compared with random ones.

    Random paths, circuits and complements; edges cut alone; templates, relations and facts elsewhere; and whether the
    circuit is searched for again under other ablations.
    """

    facts: int = 100
    compared: int = 24
    paths: int = 100
    circuits: int = 100
    complements: int = 70
    edges: int = 300
    templates: int = 3
    relations: int = 3
    elsewhere: int = 24
    again: bool = True


def subjects_of(circuit: Circuit, task: Task) -> set[str]:
    """Whom the facts that a circuit was found on are about: those of D_val, if it does not record them."""
    recorded = circuit.provenance.get("facts")
    try:
        return {str(subject) for subject, _ in recorded}  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return {fact.subject for fact in task.val.facts}


def judged_facts(
    model: Model, circuit: Circuit, task: Task, most: int, seed: int, exclude: Sequence[str] = ()
) -> tuple[Prompts, Prompts]:
    """Facts that the model knows: those that the circuit was found on, and up to `most` others."""
    subjects = subjects_of(circuit, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of facts that cannot be told apart make_task has warned
        every = told_apart(model, task.relation.facts, task.template, task.relation)
    prompts = encode(model, every, task.template, task.relation.objects, task.seed)
    known = [i for i, hit in enumerate(prompts.known.tolist()) if hit]
    seen = [i for i in known if every[i].subject in subjects]
    fresh = [i for i in known if every[i].subject not in subjects | set(exclude)]
    chosen = np.random.default_rng(seed).permutation(len(fresh))[:most]
    return prompts.select(seen), prompts.select(sorted(fresh[i] for i in chosen))


class Hearing:
    """All that is asked of one circuit."""

    def __init__(
        self, model: Model, circuit: Circuit, task: Task, cuts: Ablation, metric: str, effort: Effort,
        others: int | Sequence[Relation], exclude: Sequence[str], seed: int,
    ) -> None:  # fmt: skip
        self.model, self.circuit, self.task, self.cuts = model, circuit, task, cuts
        self.metric, self.effort, self.others, self.seed = metric, effort, others, seed
        self.used = subjects_of(circuit, task) | {*exclude}
        seen, fresh = judged_facts(model, circuit, task, effort.facts, seed, exclude)
        self.prompts = cuts.usable(fresh)
        if len(self.prompts) < 4:
            usable = "" if len(self.prompts) == len(fresh) else f" ({cuts.kind} ablation takes {len(self.prompts)})"
            raise DataError(
                f"{model.name} knows {len(fresh)} facts of {task.relation.name} that the circuit was not found on"
                f"{usable}; a judgement needs 4 at least. Take a relation with more facts, or find the circuit on "
                "fewer."
            )
        metrics = metrics_of(self.prompts)
        choose("The metric", metric, metrics)
        self.scores = Scores(model, self.prompts, cuts, metrics)
        some = np.random.default_rng(seed).permutation(len(self.prompts))[: effort.compared]
        self.few = Scores(model, self.prompts.select(sorted(some.tolist())), cuts, metrics)
        self.seen = Scores(model, cuts.usable(seen), cuts, metrics) if len(seen) > 1 else None
        if not other.tells(self.scores, metric):
            raise DataError(
                f"With all edges cut, by {cuts.kind} ablation, {model.name} answers {task.relation.name} as well as "
                "with none: there is nothing that a circuit could recover. Use another ablation."
            )

    def judge(self, progress: Progress, settings: Mapping[str, Any]) -> Judgement:
        """Run what there is to run, and answer."""
        started, effort, graph = time.monotonic(), self.effort, self.model.graph
        chosen = choose_edges(self.circuit, effort.edges, effort.paths, self.seed)
        count = self.others if isinstance(self.others, int) else len(self.others)
        runs = chosen.runs + 3 + effort.circuits + effort.complements  # of the paper's questions
        runs += 2 + effort.templates + count + (3 + 18 if effort.again else 6) + 4
        with track(progress, runs, "referee") as self.step:
            changes = edge_changes(self.few, self.circuit, chosen, self.step)
            tables = {metric: minimality_table(graph, chosen, some) for metric, some in changes.items()}
            asked = self._of_the_paper(tables, len(chosen.others))
            asked_elsewhere, rows = self._elsewhere()
            matrix, of_ablations = self._matrix()
            rivals, of_rivals = self._rivals()
        asked |= asked_elsewhere | of_ablations | of_rivals
        alpha = ALPHA / (2 * len(asked))  # of Holm's first step
        edges = tables[self.metric]
        if self.circuit.scores is not None:
            index = [graph.edge_index(f"{a}->{b}") for a, b in zip(edges["sender"], edges["receiver"], strict=True)]
            edges = edges.assign(score=self.circuit.scores[*torch.tensor(index).T].numpy())
        kept = edges["kept"].astype(bool)
        return Judgement(
            questions=questions_table({key: test(alpha) for key, test in asked.items()}),
            edges=edges[kept].drop(columns="kept").reset_index(drop=True),
            null=edges.loc[~kept, ["sender", "receiver", "effect"]].reset_index(drop=True),
            matrix=matrix,
            elsewhere=rows,
            rivals=rivals,
            provenance=self._provenance(settings, time.monotonic() - started),
        )

    def _of_the_paper(self, tables: Mapping[str, pd.DataFrame], paths: int) -> dict[tuple[str, str], _Test]:
        """The five questions of arXiv 2410.13032, in each metric."""
        graph, size = self.model.graph, self.circuit.n_edges
        seeds = range(self.seed, self.seed + self.effort.circuits)
        random = list(on_each_core(partial(random_circuit, graph, size), seeds, self.model.device))
        whole = [Circuit.full(graph), self.circuit, self.circuit.complement()]
        full, own, left = map(self.scores, whole)
        self.step(3)
        model, alone, rest = (self.few(one) for one in whole)
        drawn = self.few.each(random, self.step)
        without = self.few.each([one.complement() for one in random[: self.effort.complements]], self.step)
        asked: dict[tuple[str, str], _Test] = {}

        def apart(one: Answered, metric: str) -> float:
            return float(np.abs(one.losses[metric] - model.losses[metric]).mean())

        for metric, table in tables.items():
            scores = [-one.losses[metric] for one in (own, left, full)]
            tie = _TIE * float(np.abs(self.scores.empty.losses[metric] + scores[-1]).mean())
            closer = [apart(alone, metric) < apart(one, metric) for one in drawn]
            further = [apart(rest, metric) > apart(one, metric) for one in without]
            kept = table[table["kept"]]
            asked |= {
                ("equivalence", metric): partial(tests.equivalence, scores[0], scores[-1], tie=tie),
                ("independence", metric): partial(tests.independence, scores[1], scores[-1], tie=tie, seed=self.seed),
                ("sufficiency", metric): partial(tests.beats, closer),
                ("partial necessity", metric): partial(tests.beats, further),
                ("minimality", metric): partial(tests.minimal, kept["exceeds"], paths, kept["p"]),
            }
        return asked

    def _recovered(self, scores: Scores, circuit: Circuit | None = None) -> np.ndarray:
        return scores.recovered(circuit or self.circuit, self.metric)

    def _elsewhere(self) -> tuple[dict[tuple[str, str], _Test], pd.DataFrame]:
        """Facts that it was found on, prompts of other lengths, other templates, other relations."""
        task, effort, own = self.task, self.effort, self._recovered(self.scores)
        rows = [{"kind": "facts", "name": "others", **self._measured(self.scores)}]
        asked: dict[tuple[str, str], _Test] = {}
        if self.seen is not None and other.tells(self.seen, self.metric):
            rows.insert(0, {"kind": "facts", "name": "found on", **self._measured(self.seen)})
            if len(self.seen.prompts) >= 4:
                asked["other facts", self.metric] = self._worse(self._recovered(self.seen), own)
        self.step(2)
        short = (self.prompts.lengths <= self.prompts.lengths.float().median()).cpu().numpy()
        for name, some in (("shorter half", short), ("longer half", ~short)):
            if 4 <= some.sum() <= len(short) - 4:
                rows.append({"kind": "length", "name": name, **self._measured(self.scores, np.flatnonzero(some))})
        if rows[-1]["kind"] == "length":
            asked["prompt length", self.metric] = self._worse(own[short], own[~short])
        found: dict[str, list[np.ndarray]] = {"template": [], "relation": []}

        def add(kind: str, name: str, scores: Scores | None) -> bool:
            if scores is None:
                return False
            rows.append({"kind": kind, "name": name, **self._measured(scores)})
            found[kind].append(self._recovered(scores))
            self.step()
            return True

        for template in other.other_templates(task, effort.templates):
            add("template", template, self._scores_of(task.relation, template, self.used))
        count = effort.relations if isinstance(self.others, int) else len(self.others)
        for relation in other.other_relations(task, self.others, self.seed):
            count -= add("relation", relation.name, self._scores_of(relation, 0, ()))
            if not count:
                break
        if found["template"]:
            asked["other templates", self.metric] = self._worse(own, np.concatenate(found["template"]))
        if found["relation"]:
            asked["specificity", self.metric] = self._better(own, np.concatenate(found["relation"]))
        return asked, pd.DataFrame(rows)

    def _scores_of(self, relation: Relation, template: int | str, without: Iterable[str]) -> Scores | None:
        """The circuit's ablation on some facts of a relation; None where the model has nothing that could be lost."""
        task = other.task_elsewhere(self.model, relation, template, self.effort.elsewhere, self.seed, without)
        if task is None or (self.metric == "logit_diff" and "logit_diff" not in metrics_of(task.val)):
            return None
        cuts = make_ablation(self.model, task, self.cuts.kind)
        if cuts.kind.paired and int(task.val.paired.sum()) < 4:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scores = Scores(self.model, cuts.usable(task.val), cuts, metrics_of(task.val))
        return scores if other.tells(scores, self.metric) else None

    def _matrix(self) -> tuple[pd.DataFrame, dict[tuple[str, str], _Test]]:
        """Found under each ablation, tested under each."""
        own = str(self.cuts.kind)
        tested = other.scores_under(self.model, self.task, self.scores, own)
        tested = {name: scores for name, scores in tested.items() if other.tells(scores, self.metric)}
        under = str(self.circuit.provenance.get("ablation", own))
        found = {under: self.circuit}
        if self.effort.again:
            found = other.found_under(self.model, self.task, self.circuit, under, self.step)
        rows = other.across(found, tested, self.metric, self.seed, self.step)
        others = [self._recovered(scores) for name, scores in tested.items() if name != own]
        asked = {}
        if others:
            asked["other ablations", self.metric] = self._worse(
                self._recovered(self.scores), np.mean(others, axis=0), paired=True
            )
        return pd.DataFrame(rows), asked

    def _rivals(self) -> tuple[pd.DataFrame, dict[tuple[str, str], _Test]]:
        """The best circuits without the strongest edges of this one."""
        circuit, scores = self.circuit, self.circuit.scores
        if scores is None or bool(scores[circuit.graph.exists].isnan().any()) or was_pruned(circuit):
            scores = other.edge_scores(self.model, self.task, circuit, self.cuts.kind)
        size = circuit.n_edges
        tenth = math.ceil(size / 10)
        rows, asked = [], {}
        for k, (rival, shared) in other.rivals(circuit, scores, sorted({1, tenth, math.ceil(size / 2), size})).items():
            row = other.measured(self.scores, rival, self.metric, self.seed)
            kept = {key: row[key] for key in ("nll", "faithfulness", "low", "high")}
            rows.append({"without": k, "edges": rival.n_edges, "shared": shared, **kept})
            if k == tenth:
                theirs = self._recovered(self.scores, rival)
                asked["uniqueness", self.metric] = self._better(self._recovered(self.scores), theirs, paired=True)
            self.step()
        return pd.DataFrame(rows), asked

    def _worse(self, here: np.ndarray, there: np.ndarray, paired: bool = False) -> _Test:
        """The claim that it is no worse there."""
        return partial(tests.difference, here, there, paired=paired, seed=self.seed)

    def _better(self, here: np.ndarray, there: np.ndarray, paired: bool = False) -> _Test:
        """The claim that it is better here."""
        worse = self._worse(here, there, paired)

        def test(alpha: float) -> tests.Tested:
            found = worse(alpha)
            return found._replace(p_for=found.p_against, p_against=found.p_for)

        return test

    def _measured(self, scores: Scores, facts: np.ndarray | slice = slice(None)) -> dict[str, Any]:
        return other.measured(scores, self.circuit, self.metric, self.seed, facts)

    def _provenance(self, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        circuit = self.circuit
        made = record(self.model, self.task, self.prompts.facts)
        made["circuit"] = {
            "digest": circuit.digest, "edges": circuit.n_edges, "nodes": circuit.n_nodes,
            "of_edges": circuit.graph.n_edges, "of_nodes": circuit.graph.n_senders - 1,
            "found with": found_with(circuit.provenance),
            "found on": len(self.seen.prompts) if self.seen else 0,
            **{key: circuit.provenance[key] for key in ("format", "file", "consensus") if key in circuit.provenance},
        }  # fmt: skip
        return {**made, "settings": dict(settings), "judged on": len(self.prompts), "seconds": round(seconds, 1)}
