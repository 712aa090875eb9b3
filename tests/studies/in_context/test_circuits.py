"""Resampled circuits are those of facts drawn again, and new heads are counted over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.selection import select_edges
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.models.graph import Graph
from kcwb.studies.in_context.circuits import ResampledCircuit, context_circuits, new_heads
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.shots import make_shots
from tests.studies.in_context.conftest import _filler


def test_resamples_are_circuits_of_facts_drawn_again(made):
    model, task = made("llama")
    zero = make_shots(model, task.relation, 0, n=4, n_test=6, sets=2)
    edges, steps, seed = 40, 2, 3
    found = context_circuits(
        model, {"0": zero, "2": task}, edges=edges, steps=steps, resamples=5, seed=seed, progress=False
    )
    counts = np.random.default_rng(seed).multinomial(4, [0.25] * 4, 5)
    for name, one in (("0", zero), ("2", task)):
        cuts = make_ablation(model, one, "mean")
        circuit, kept = found[name].circuit, found[name].circuit.kept
        scores = attribution_scores(model, make_loss(model, one.val, "nll"), cuts, steps=steps)
        assert abs(circuit.n_edges - edges) <= 3 and circuit.provenance["shots"]["k"] == int(name)
        asked = int((scores[model.graph.exists] >= scores[kept].min() - 1e-6).sum())
        for i, count in enumerate(counts):
            rows = [row for row, n in enumerate(count) for _ in range(n)]
            again = attribution_scores(model, make_loss(model, one.val.select(rows), "nll"), cuts, steps=steps)
            slow = Circuit(model.graph, select_edges(model.graph, again, edges=asked)).without_dangling()
            nodes = set(np.array(model.graph.sender_names)[found[name].presence[i]])
            assert len(nodes ^ (set(slow.nodes["node"]) - {"logits"})) <= 1  # rounding may swap the last edge


def test_new_shared_and_gone_heads_are_counted_over_resamples():
    graph = Graph(2, 2)
    names = graph.sender_names

    def circuit(*nodes: str) -> Circuit:
        edges = [
            edge for node in nodes for edge in (f"input->{node}{'' if node[0] == 'm' else '<v>'}", f"{node}->logits")
        ]
        return Circuit.from_edges(graph, edges)

    def presence(**shares: int) -> np.ndarray:
        found = np.zeros((10, graph.n_senders), bool)
        for node, count in shares.items():
            found[:count, names.index(node.replace("_", "."))] = True
        return found

    before = ResampledCircuit(circuit("a0.h0", "m0", "a1.h1"), presence(a0_h0=10, m0=9, a1_h1=10, a0_h1=3))
    after = ResampledCircuit(circuit("a0.h0", "a0.h1", "a1.h0", "m1"), presence(a0_h0=9, a0_h1=10, a1_h0=8, m1=10))
    table = new_heads(before, after).set_index("node")
    assert table["status"].to_dict() == {
        "a0.h0": "shared", "a0.h1": "unsure", "m0": "gone", "a1.h0": "new", "a1.h1": "gone", "m1": "new"
    }  # fmt: skip
    assert [table[column]["a0.h1"] for column in ("new", "both", "in_after")] == [0.7, 0.3, 1.0]
    assert new_heads(before, after, least=0.7).set_index("node").loc["a0.h1", "status"] == "new"
    assert table.loc["m1", "kind"] == "mlp" and list(table.index) == [n for n in names if n in table.index]
    with pytest.raises(SettingError, match="least=0"):
        new_heads(before, after, least=0)
    with pytest.raises(SettingError, match="10 and 5 resamples"):
        new_heads(before, replace(after, presence=after.presence[:5]))


def test_a_single_fact_and_different_facts_are_refused(made):
    model, task = made("llama")
    one, other = (
        make_shots(model, task.relation, 1, n=4, n_test=0, seed=seed, unrelated=[_filler()]) for seed in (0, 5)
    )
    single = make_shots(model, task.relation, 1, n=1, n_test=0, unrelated=[_filler()])
    with pytest.raises(DataError, match="ask 1 in D_val"):
        context_circuits(model, {"1": single}, edges=9, progress=False)
    with pytest.raises(DataError, match="ask different facts"):
        context_circuits(model, {"1": one, "other": other}, edges=9, progress=False)


def test_a_circuit_that_falls_apart_is_refused(made):
    model, task = made("llama")
    with pytest.raises(CircuitError, match="are not connected"):
        context_circuits(model, {"2": task}, edges=1, resamples=2, progress=False)
