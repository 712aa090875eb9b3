"""The confidence curve, against the completeness of each consensus circuit on the facts that it has not seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.many import discover_many
from kcwb.errors import CircuitError, DataError
from kcwb.evaluation.completeness import completeness
from kcwb.evaluation.confidence import confidence_curve
from kcwb.statistics import proportion_interval
from kcwb.tasks.task import make_task
from tests.tasks import known_relation
from tests.tiny import tiny_model

CONFIDENCES = (0.2, 0.6, 1.0)
QUIET = {"progress": False}


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 20), n=8)


@pytest.fixture
def ensemble(model, task):
    return discover_many(model, task, "eap", edges=60, draws=10, twins=0, checkpoint=False, **QUIET)


def alone(model, circuit: Circuit, task, prompts):
    """Hit@10 and loss of a circuit, and the facts, by the completeness table."""
    one = replace(task, val=prompts, test=prompts.select([]))
    return completeness(model, circuit, one, ablation="mean", draws=0, **QUIET).set_index("run").loc["circuit"]


def test_the_whole_is_tested_on_d_test(model, task, ensemble):
    curve = confidence_curve(model, ensemble, task, confidences=CONFIDENCES, draws=2, **QUIET)
    for row in curve[(curve["split"] == "D_test") & (curve["run"] == "consensus")].itertuples():
        circuit = ensemble.consensus(row.confidence)
        expected = alone(model, circuit, task, task.test)
        assert (row.edges, row.n, row.hit) == (circuit.n_edges, len(task.test), expected["hit"])
        assert row.nll == pytest.approx(expected["nll"], abs=1e-5)
    for row in curve[(curve["split"] == "D_test") & (curve["run"] == "random circuits")].itertuples():
        size = int(row.edges)
        some = [random_circuit(model.graph, size, seed) if size else Circuit.empty(model.graph) for seed in (0, 1)]
        found = [alone(model, circuit, task, task.test) for circuit in some]
        assert row.hit == pytest.approx(sum(one["hit"] for one in found) / 2)
        assert row.nll == pytest.approx(sum(one["nll"] for one in found) / 2, abs=1e-5)


def test_each_half_is_tested_on_the_other(model, task, ensemble):
    halves = ensemble.provenance["halves"]
    assert sorted([*halves[0], *halves[1]]) == list(range(8)) and not {*halves[0]} & {*halves[1]}
    curve = ensemble.curve(model, task, confidences=CONFIDENCES, draws=0, **QUIET)
    rows = curve[curve["split"] == "D_val, cross-fitted"].set_index("confidence")
    assert set(curve["run"]) == {"consensus"}
    for confidence in CONFIDENCES:
        hits, losses, sizes = 0.0, 0.0, 0
        for half, unseen in zip(ensemble.halves, reversed(halves), strict=True):
            circuit = half.consensus(confidence)
            found = alone(model, circuit, task, task.val.select(unseen))
            hits, losses, sizes = hits + 4 * found["hit"], losses + 4 * found["nll"], sizes + circuit.n_edges
        row = rows.loc[confidence]
        assert (row["n"], row["hit"], row["edges"]) == (8, hits / 8, sizes / 2)
        assert row["nll"] == pytest.approx(losses / 8, abs=1e-5)
        assert (row["low"], row["high"]) == proportion_interval([1] * round(hits) + [0] * (8 - round(hits)))


def test_no_half_has_seen_the_facts_of_the_other(model, task, ensemble):
    """Made on one half alone, with that half's draws, the ensemble is the same."""
    halves = ensemble.provenance["halves"]
    for half, rows, other in zip(ensemble.halves, halves, reversed(halves), strict=True):
        changed = task.val.select([rows[0] if i in other else i for i in range(8)])
        again = discover_many(
            model, replace(task, val=changed), "eap", edges=60, draws=10, twins=0, vary=["facts", "setting"],
            checkpoint=False, **QUIET,
        )  # fmt: skip
        same = discover_many(
            model, task, "eap", edges=60, draws=10, twins=0, vary=["facts", "setting"], checkpoint=False, **QUIET
        )
        number = ensemble.halves.index(half)
        assert again.halves[number].edges.equals(same.halves[number].edges)


def test_progress_counts_circuits(model, task, ensemble):
    calls: list[tuple[int, int]] = []
    confidence_curve(model, ensemble, task, confidences=CONFIDENCES, draws=1, progress=lambda *c: calls.append(c[:2]))
    assert calls == [(i + 1, 3 * 3 * 2) for i in range(18)]


def test_what_cannot_be_tested_is_refused(model, task, ensemble):
    empty = replace(task, test=task.test.select([]))
    with pytest.raises(DataError, match="no facts to test on"):
        confidence_curve(model, replace(ensemble, halves=()), empty, **QUIET)
    with pytest.raises(DataError, match="not all in D_val"):
        confidence_curve(model, ensemble, replace(task, val=task.test), **QUIET)
    stranger = tiny_model("llama", seed=1)
    with pytest.raises(CircuitError, match="weights"):
        confidence_curve(stranger, ensemble, make_task(stranger, known_relation(stranger, 20), n=8), **QUIET)
    larger = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(CircuitError, match="The ensemble is of"):
        confidence_curve(larger, ensemble, make_task(larger, known_relation(larger, 20), n=8), **QUIET)


def test_facts_on_which_the_ablation_is_not_defined_are_left_out_of_either_split(model, task, ensemble):
    lonely = ensemble.provenance["halves"][0][0]
    paired = task.val.paired.clone()
    paired[lonely] = False
    val = replace(task.val, paired=paired)
    with pytest.warns(UserWarning, match="left out"):
        curve = confidence_curve(
            model, ensemble, replace(task, val=val), confidences=[0.6], ablation="resample", draws=0, **QUIET
        )
    assert curve.set_index("split").loc["D_val, cross-fitted", "n"] == 7
