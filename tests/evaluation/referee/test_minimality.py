"""Minimality against runs of each circuit, one by one; random paths against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, SettingError
from kcwb.evaluation.referee.minimality import choose_edges, minimality, random_path
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tasks import known_relation


@pytest.fixture(params=["llama", "neox"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 9), n=4)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_effects_are_those_of_runs_with_and_without_an_edge(model, task, ablation, metric):
    circuit = random_circuit(model.graph, 15, seed=3)
    table = minimality(model, circuit, task, ablation=ablation, metric=metric, paths=8, seed=5, progress=False)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)

    def losses(kept):
        return loss.per_prompt(run_circuit(model, kept, loss.prompts, cuts)).double().numpy()

    def without(kept, edge):
        less = kept.clone()
        less[model.graph.edge_index(edge)] = False
        return less

    chosen = choose_edges(circuit, 300, 8, 5)
    assert table["kept"].sum() == 15 and len(table) == 15 + 8
    expected = {True: [], False: []}
    for edge in circuit.kept.nonzero():
        expected[True].append((model.graph.edge_name(*edge.tolist()), circuit.kept))
    for edge, kept in zip(chosen.others, chosen.inflated, strict=True):
        expected[False].append((model.graph.edge_name(*edge.tolist()), kept))
    for kept, some in expected.items():
        changes = [losses(without(whole, edge)) - losses(whole) for edge, whole in some]
        rows = table[table["kept"] == kept].sort_values(["effect", "cost"])
        assert sorted(rows["sender"] + "->" + rows["receiver"]) == sorted(edge for edge, _ in some)
        assert sorted(rows["effect"]) == pytest.approx(sorted(np.abs(x).mean() for x in changes), abs=2e-5)
        assert sorted(rows["cost"]) == pytest.approx(sorted(x.mean() for x in changes), abs=2e-5)
    random = table.loc[~table["kept"], "effect"].to_numpy()
    kept = table[table["kept"]]
    for _, row in kept.iterrows():
        assert row["exceeds"] == (row["effect"] > random).mean()
        below = round(row["exceeds"] * 8)
        assert row["p"] == pytest.approx(sum(stats.binom.pmf(k, 8, 0.9) for k in range(below + 1)))
    assert kept["effect"].is_monotonic_increasing and table.loc[~table["kept"], "exceeds"].isna().all()


def test_a_random_path_leads_from_input_to_logits_through_edges_that_exist():
    graph, lengths = Graph(3, 2), set()
    for seed in range(50):
        path = random_path(graph, torch.Generator().manual_seed(seed))
        assert graph.exists[*path.T].all() and path[0, 0] == 0 and path[-1, 1] == graph.n_receivers - 1
        assert graph.receiver_node[path[:-1, 1]].tolist() == path[1:, 0].tolist()
        lengths.add(len(path))
    assert len(lengths) > 2


def test_random_edges_are_new_and_stand_in_a_circuit_with_their_path():
    graph = Graph(3, 2)
    circuit = random_circuit(graph, 12, seed=0)
    chosen = choose_edges(circuit, 5, 20, 1)
    assert len(chosen.edges) == 5 and circuit.kept[*chosen.edges.T].all() and not circuit.kept[*chosen.others.T].any()
    for edge, kept in zip(chosen.others, chosen.inflated, strict=True):
        assert kept[*edge] and (kept | circuit.kept).equal(kept)
        assert Circuit(graph, kept).without_dangling().kept[*edge]


def test_what_cannot_be_asked_is_said(model, task):
    with pytest.raises(CircuitError, match="keeps no edge"):
        minimality(model, Circuit.empty(model.graph), task, progress=False)
    with pytest.raises(CircuitError, match="keeps every edge"):
        minimality(model, Circuit.full(model.graph), task, progress=False)
    with pytest.raises(CircuitError, match="graph of 3 layers"):
        minimality(model, Circuit.full(Graph(3, 4)), task, progress=False)
    for wrong in ({"metric": "accuracy"}, {"paths": 0}, {"most": 0}):
        with pytest.raises(SettingError):
            minimality(model, random_circuit(model.graph, 20, 0), task, progress=False, **wrong)


def test_every_run_is_reported_and_seeds_decide(model, task):
    calls = []
    circuit = random_circuit(model.graph, 20, seed=0)
    one = minimality(model, circuit, task, paths=5, progress=lambda *call: calls.append(call[:2]))
    again, other = (minimality(model, circuit, task, paths=5, seed=seed, progress=False) for seed in (0, 1))
    # 16 edges and their circuit, 4 and theirs, 5 paths with and without an edge
    assert calls == [(done, 32) for done in (17, 22, 24, 26, 28, 30, 32)]
    assert one.equals(again) and not one.equals(other)
