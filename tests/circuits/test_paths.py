"""The strongest paths, against writing down every path of small circuits."""

from __future__ import annotations

import math

import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.paths import strongest_paths
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph
from tests.circuits.test_circuit import GRAPHS, random_circuit


def every_path(circuit):
    """All paths as lists of edges, by walking along all of them."""
    graph, found = circuit.graph, []

    def walk(node, path):
        if node == "logits":
            found.append(path)
            return
        for column in circuit.kept[graph.sender_index(node)].nonzero()[:, 0].tolist():
            receiver = graph.receiver_names[column]
            walk(receiver.split("<")[0], [*path, f"{node}->{receiver}"])

    walk("input", [])
    return found


def measured(circuit, path):
    """Strength, product and minus the length."""
    sizes = [abs(float(circuit.scores[circuit.graph.edge_index(edge)])) for edge in path]
    return min(sizes), math.prod(sizes), -len(path)


def passes(path, node):
    return any(node in (edge.split("->")[0], edge.split("->")[1].split("<")[0]) for edge in path)


def rounded(keys):
    return [tuple(round(value, 9) for value in key) for key in keys]


@pytest.mark.parametrize("few", [False, True], ids=["all strengths apart", "many ties"])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_paths_are_the_best_of_all_in_order(graph, few):
    for seed in range(4):
        circuit = random_circuit(graph, seed, 0.6 if graph.n_layers < 4 else 0.4, scored=True)
        if few:
            scores = (circuit.scores * 2).round() / 2
            circuit = Circuit(graph, circuit.kept, scores)
        for through in (None, "input", "m0", f"a{graph.n_layers - 1}.h0", "logits"):
            paths = [path for path in every_path(circuit) if through is None or passes(path, through)]
            best = sorted((measured(circuit, path) for path in paths), reverse=True)
            found = strongest_paths(circuit, 25, through=through)
            keys = [measured(circuit, path) for path in found["edges"]]
            if few:  # among products of 0 those with fewer zeros come first, so that length does not decide alone
                keys, best = [key[:2] for key in keys], [key[:2] for key in best]
            assert rounded(keys) == rounded(best[:25])
            assert len({tuple(path) for path in found["edges"]}) == len(found)
            assert all(path in paths for path in found["edges"])


def test_a_path_is_told_by_its_edges_text_strength_product_and_length():
    scores = {
        "input->a0.h0<v>": 0.5, "a0.h0->m1": -0.4, "m1->logits": 2.0, "input->m1": 0.3, "input->logits": 0.1,
        "a0.h0->a1.h1<q>": 9.0,
    }  # fmt: skip
    found = strongest_paths(Circuit.from_edges(Graph(2, 2), scores))
    assert found["path"].tolist() == [
        "input -> a0.h0<v> -> m1 -> logits", "input -> m1 -> logits", "input -> logits",
    ]  # fmt: skip
    assert found["edges"][0] == ["input->a0.h0<v>", "a0.h0->m1", "m1->logits"]
    assert found["strength"].tolist() == pytest.approx([0.4, 0.3, 0.1])
    assert found["product"].tolist() == pytest.approx([0.4, 0.6, 0.1])
    assert found["length"].tolist() == [3, 2, 1]


def test_query_key_and_value_are_paths_of_their_own():
    edges = {f"input->a0.h0<{letter}>": i + 1.0 for i, letter in enumerate("qkv")} | {"a0.h0->logits": 5.0}
    found = strongest_paths(Circuit.from_edges(Graph(1, 1), edges), 2)
    assert found["path"].tolist() == ["input -> a0.h0<v> -> logits", "input -> a0.h0<k> -> logits"]


def test_without_scores_the_shortest_come_first():
    circuit = random_circuit(Graph(3, 2), 1, 0.5)
    found = strongest_paths(circuit, 30)
    assert found["length"].tolist() == sorted(map(len, every_path(circuit)))[:30]
    assert found["strength"].isna().all() and found["product"].isna().all()
    unscored = Circuit(circuit.graph, circuit.kept, torch.full(circuit.kept.shape, math.nan))
    assert strongest_paths(unscored, 30)["path"].tolist() == found["path"].tolist()


def test_an_edge_without_a_score_counts_as_zero():
    edges = {"input->m0": math.nan, "m0->logits": 3.0, "input->logits": 0.1}
    found = strongest_paths(Circuit.from_edges(Graph(1, 1), edges))
    assert found["path"].tolist() == ["input -> logits", "input -> m0 -> logits"]
    assert found["strength"].tolist() == pytest.approx([0.1, 0.0])


def test_a_circuit_without_a_path_has_none_and_a_large_one_is_quick():
    assert strongest_paths(Circuit.empty(Graph(2, 2))).empty
    assert list(strongest_paths(Circuit.empty(Graph(2, 2)))) == ["path", "edges", "strength", "product", "length"]
    full = random_circuit(Graph(12, 12), 0, 1.0, scored=True)  # of 32,491 edges and more paths than can be counted
    found = strongest_paths(full, 20)
    assert len(found) == 20 and found["strength"].is_monotonic_decreasing


def test_an_unknown_node_and_no_paths_at_all_are_refused():
    circuit = random_circuit(Graph(2, 2))
    with pytest.raises(CircuitError, match=r"through: 'a1.h5' is no node\. Did you mean 'a1"):
        strongest_paths(circuit, through="a1.h5")
    with pytest.raises(SettingError, match="strongest_paths: k=0"):
        strongest_paths(circuit, 0)
