"""Which edges are kept, against sorting and growing by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.selection import SELECTIONS as ALL
from kcwb.discovery.selection import resize, select_edges
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph

#: Those that go by each edge alone; the other one has a test file of its own.
SELECTIONS = [name for name in ALL if name not in ("optimal", "tuned")]  # by scores alone, of any number
GRAPHS = [Graph(2, 3), Graph(2, 3, parallel=True), Graph(3, 1)]
GRAPH = GRAPHS[0]


def scores_of(graph, seed=0, ties=False):
    """Random scores, also where there is no edge; with ties, of a few whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, graph.exists.shape, generator=generator).float()
    return torch.randn(graph.exists.shape, generator=generator)


def edges_of(graph) -> list[tuple[int, int]]:
    """All edges, earlier senders first."""
    return [(i, j) for i in range(graph.n_senders) for j in range(graph.n_receivers) if graph.exists[i, j]]


def pairs(kept) -> set[tuple[int, int]]:
    return {(i, j) for i, j in kept.nonzero().tolist()}


def by_hand(graph, scores, select, edges) -> set[tuple[int, int]]:
    def value(edge):
        score = float(scores[edge])
        return score if select == "signed" else abs(score)

    if select != "greedy":
        return set(sorted(edges_of(graph), key=lambda edge: (-value(edge), edge))[:edges])
    inside, kept = {"logits"}, set()
    while len(kept) < edges:
        open_edges = [
            edge
            for edge in edges_of(graph)
            if edge not in kept and graph.receiver_names[edge[1]].split("<")[0] in inside
        ]
        best = min(open_edges, key=lambda edge: (-value(edge), edge))
        kept.add(best)
        inside.add(graph.sender_names[best[0]])
    return kept


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_as_many_edges_as_asked_are_those_chosen_by_hand(graph, select, ties, share):
    edges = max(1, round(share * graph.n_edges))
    for seed in range(3):
        scores = scores_of(graph, seed, ties)
        kept = select_edges(graph, scores, edges=edges, select=select)
        assert int(kept.sum()) == edges
        assert pairs(kept) == by_hand(graph, scores, select, edges)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("select", ["signed", "absolute"])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 1.0, 99.0])
def test_a_threshold_keeps_every_edge_that_reaches_it(graph, select, threshold):
    scores = scores_of(graph, ties=True)
    kept = select_edges(graph, scores, threshold=threshold, select=select)
    expected = {
        edge
        for edge in edges_of(graph)
        if (float(scores[edge]) if select == "signed" else abs(float(scores[edge]))) >= threshold
    }
    assert pairs(kept) == expected


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.5, 99.0])
def test_a_greedy_threshold_keeps_what_is_reached_from_the_output_through_strong_edges(graph, threshold):
    scores = scores_of(graph, seed=1)
    strong = {edge for edge in edges_of(graph) if abs(float(scores[edge])) >= threshold}
    inside, expected = {"logits"}, set()
    for _ in range(graph.n_senders):
        reached = {edge for edge in strong if graph.receiver_names[edge[1]].split("<")[0] in inside}
        expected |= reached
        inside |= {graph.sender_names[row] for row, _ in reached}
    assert pairs(select_edges(graph, scores, threshold=threshold, select="greedy")) == expected


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_threshold_below_everything_keeps_all_edges_and_no_more(select):
    kept = select_edges(GRAPH, scores_of(GRAPH), threshold=-math.inf, select=select)
    assert kept.equal(GRAPH.exists)


def test_greedy_leaves_no_dead_ends():
    kept = select_edges(GRAPH, scores_of(GRAPH), edges=12, select="greedy")
    receivers = {GRAPH.receiver_names[j].split("<")[0] for _, j in pairs(kept)}
    senders = {GRAPH.sender_names[i] for i, _ in pairs(kept)}
    assert receivers <= senders | {"logits"}


def test_signed_and_absolute_differ_by_the_edges_that_cutting_helps():
    scores = torch.zeros(GRAPH.exists.shape)
    good, bad = GRAPH.edge_index("m0->logits"), GRAPH.edge_index("m1->logits")
    scores[good], scores[bad] = 1.0, -2.0
    assert pairs(select_edges(GRAPH, scores, edges=1)) == {good}
    assert pairs(select_edges(GRAPH, scores, edges=1, select="absolute")) == {bad}


def test_scores_are_left_alone():
    scores = scores_of(GRAPH)
    before = scores.clone()
    for select in SELECTIONS:
        select_edges(GRAPH, scores, edges=3, select=select)
    assert scores.equal(before)


@pytest.mark.parametrize("edges", [0, -1, GRAPH.n_edges + 1])
def test_a_number_of_edges_that_cannot_be_is_an_error_with_the_most(edges):
    with pytest.raises(SettingError, match=rf"edges={edges}.*{GRAPH.n_edges}"):
        select_edges(GRAPH, scores_of(GRAPH), edges=edges)


@pytest.mark.parametrize("given", [{}, {"edges": 3, "threshold": 0.1}])
def test_a_number_and_a_threshold_exclude_each_other(given):
    with pytest.raises(SettingError, match="either edges"):
        select_edges(GRAPH, scores_of(GRAPH), **given)


def test_an_unknown_selection_suggests_the_nearest():
    with pytest.raises(SettingError, match=r"'sign'.*'signed'"):
        select_edges(GRAPH, scores_of(GRAPH), edges=3, select="sign")


# Another size


def scored(graph=GRAPH, **more) -> Circuit:
    scores = scores_of(graph).masked_fill(~graph.exists, math.nan)  # as discovery leaves them
    return Circuit(graph, graph.exists.clone(), scores, more)


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("size", [{"edges": 1}, {"edges": 15}, {"edges": GRAPH.n_edges}, {"threshold": 0.5}])
def test_resizing_selects_anew_and_drops_dangling_edges(select, size):
    circuit = scored(method="eap", model={"name": "m"})
    found = resize(circuit, **size, select=select)
    expected = Circuit(GRAPH, select_edges(GRAPH, circuit.scores, **size, select=select)).without_dangling()
    assert found.kept.equal(expected.kept)
    assert found.scores.equal(circuit.scores) or found.scores.nan_to_num(9).equal(circuit.scores.nan_to_num(9))
    assert found.provenance["method"] == "eap" and found.provenance["model"] == {"name": "m"}
    assert found.provenance["parameters"] == {"edges": None, "threshold": None, **size, "select": select}


def test_resizing_keeps_to_the_circuits_own_selection():
    circuit = scored(parameters={"select": "absolute", "edges": 5, "steps": 3})
    found = resize(circuit, edges=20)
    assert found.kept.equal(resize(circuit, edges=20, select="absolute").kept)
    assert not found.kept.equal(resize(circuit, edges=20, select="signed").kept)
    assert found.provenance["parameters"] == {"select": "absolute", "edges": 20, "threshold": None, "steps": 3}
    assert circuit.provenance["parameters"]["edges"] == 5


def test_resizing_there_and_back_gives_the_same_circuit():
    circuit = resize(scored(), edges=30)
    assert resize(resize(circuit, edges=5), edges=30).kept.equal(circuit.kept)


def test_a_pruned_circuit_is_not_resized():
    """Increases of the loss rank no edges, even where every edge has one."""
    with pytest.raises(CircuitError, match="tau_path"):
        resize(scored(method="acdc"), edges=3)


@pytest.mark.parametrize("unscored", ["all", "one"])
def test_a_circuit_with_unscored_edges_is_not_resized(unscored):
    circuit = scored()
    if unscored == "all":
        circuit = Circuit(GRAPH, circuit.kept)
    else:
        circuit.scores[GRAPH.edge_index("m0->m1")] = math.nan
    with pytest.raises(CircuitError, match="every edge has a score"):
        resize(circuit, edges=3)
