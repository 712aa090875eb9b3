"""Circuits on other relations' facts, against plain runs one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.evaluation import transfer as module
from kcwb.evaluation.transfer import transfer_matrix
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.handmade import copying_head
from tests.tasks import known_relation

TEMPLATES = {"one": "w1 {} w2", "two": "w7 w8 {} w9"}


@pytest.fixture
def tasks(tiny):
    model = tiny("llama")
    return {
        name: make_task(model, replace(known_relation(model, 16, text), name=name), n=4, n_test=8)
        for name, text in TEMPLATES.items()
    }


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_every_cell_is_a_plain_run_of_that_circuit_on_those_facts(tiny, tasks, ablation):
    model = tiny("llama")
    circuits = {name: discover(model, task, "eap", edges=40, progress=False) for name, task in tasks.items()}
    table = transfer_matrix(model, circuits, tasks, ablation=ablation, draws=3, progress=False)
    assert [*zip(table["task"], table["circuit"], strict=True)] == [(t, c) for t in tasks for c in circuits]
    assert (table["own"] == (table["task"] == table["circuit"])).all()
    used = {fact for task in tasks.values() for fact in task.val.facts}
    for row in table.itertuples():
        task = tasks[row.task]
        rows = [i for i, fact in enumerate(task.test.facts) if task.test.known[i] and fact not in used]
        prompts = task.test.select(rows)
        cuts, loss = make_ablation(model, task, ablation), make_loss(model, prompts, "nll")

        def nats(kept, prompts=prompts, cuts=cuts, loss=loss):
            return float(loss(run_circuit(model, kept, prompts, cuts)))

        own, full, empty = nats(circuits[row.circuit]), nats(None), nats(Circuit.empty(model.graph))
        assert row.n == len(rows) > 0 and row.edges == circuits[row.circuit].n_edges
        assert (row.nll, row.nll_model, row.nll_empty) == pytest.approx((own, full, empty), abs=1e-4)
        assert row.faithfulness == pytest.approx((empty - own) / (empty - full), rel=1e-3)
        others = [nats(random_circuit(model.graph, row.edges, seed)) for seed in range(3)]
        chance = (empty - np.array(others)) / (empty - full)
        assert row.chance == pytest.approx(chance.mean(), rel=1e-3)
        assert row.p == (1 + (chance >= row.faithfulness).sum()) / 4


def test_circuits_of_like_sizes_share_their_random_ones():
    sizes = range(1, 5000)
    assert all(abs(module._about(size) - size) <= 0.05 * size + 0.5 for size in sizes)
    assert all(module._about(size) == size for size in (0, 1, 7, 50))
    assert len({module._about(size) for size in range(240, 275)}) <= 3


def test_a_planted_circuit_serves_another_relation_of_the_same_heads_and_an_empty_one_none():
    model, relation, *_ = found = copying_head()
    halves = [replace(relation, name=str(i), facts=relation.facts[i::2]) for i in range(2)]
    tasks = {one.name: make_task(model, one, n=4, n_test=4) for one in halves}
    truth = Circuit.from_edges(model.graph, sorted(found.truth("mean")))
    table = transfer_matrix(model, {"0": truth, "none": Circuit.empty(model.graph)}, tasks, draws=20, progress=False)
    of = table.set_index(["circuit", "task"])
    assert (of.loc["0", "faithfulness"] > 0.9).all() and (of.loc["0", "p"] < 0.1).all()
    assert (of.loc["none", "faithfulness"].abs() < 1e-6).all() and of.loc["none", "p"].isna().all()


def test_what_cannot_be_asked_is_refused(tiny, tasks):
    model, circuit = tiny("llama"), Circuit.empty(tiny("llama").graph)
    with pytest.raises(SettingError, match="at least one"):
        transfer_matrix(model, {}, tasks, progress=False)
    with pytest.raises(CircuitError):
        transfer_matrix(model, {"x": Circuit.empty(Graph(3, 4))}, tasks, progress=False)
    task = tasks["one"]
    nothing = replace(task, test=replace(task.test, ranks=torch.full_like(task.test.ranks, 50)))
    with pytest.raises(DataError, match="larger n_test"):
        transfer_matrix(model, {"x": circuit}, {"one": nothing}, progress=False)


def test_a_circuit_of_nearly_all_edges_has_random_ones_of_no_more_than_there_are(tiny):
    model = tiny("neox")
    assert module._about(model.graph.n_edges) > model.graph.n_edges
    task = make_task(model, known_relation(model, 16), n=4, n_test=8)
    table = transfer_matrix(model, {"all": Circuit.full(model.graph)}, {"one": task}, draws=2, progress=False)
    assert table["chance"].to_numpy() == pytest.approx(table["faithfulness"].to_numpy(), abs=1e-5)


def test_a_task_of_which_nothing_can_be_asked_is_refused_before_any_circuit_is_run(tiny, tasks, monkeypatch):
    monkeypatch.setattr(module, "Scores", lambda *_: pytest.fail("work was done"))
    two = tasks["two"]
    nothing = replace(two, test=replace(two.test, ranks=torch.full_like(two.test.ranks, 50)))
    with pytest.raises(DataError, match="larger n_test"):
        transfer_matrix(tiny("llama"), {"x": Circuit.empty(tiny("llama").graph)}, {**tasks, "two": nothing})
