"""Two circuits side by side, against counting by hand."""

from __future__ import annotations

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import weighted_iou
from kcwb.errors import CircuitError
from kcwb.evaluation.compare import compare_circuits
from kcwb.models.graph import Graph
from tests.ensembles import certain, drawn

GRAPH = Graph(2, 2)


def test_counts_by_hand():
    left = Circuit.from_edges(GRAPH, ["input->m0", "m0->a1.h0<q>", "a1.h0->logits"])
    right = Circuit.from_edges(GRAPH, ["input->m0", "m0->a1.h0<k>", "a1.h0->m1", "m1->logits"])
    table = compare_circuits(left, right)
    assert table.loc["edges"].to_dict() == pytest.approx(
        {"left": 3, "right": 4, "shared": 1, "only_left": 2, "only_right": 3, "iou": 1 / 6}
    )
    assert table.loc["nodes"].to_dict() == pytest.approx(
        {"left": 2, "right": 3, "shared": 2, "only_left": 0, "only_right": 1, "iou": 2 / 3}
    )


def test_empty_circuits_are_alike():
    assert list(compare_circuits(Circuit.empty(GRAPH), Circuit.empty(GRAPH))["iou"]) == [1.0, 1.0]


def test_circuits_of_different_graphs_do_not_compare():
    with pytest.raises(CircuitError, match="different graphs"):
        compare_circuits(Circuit.empty(GRAPH), Circuit.empty(Graph(2, 3)))


def test_ensembles_share_the_smaller_pi():
    short = Circuit.from_edges(GRAPH, ["input->m0", "m0->logits"])
    long = Circuit.from_edges(GRAPH, ["input->m0", "m0->m1", "m1->logits"])
    left, right = drawn(short, short, short, long), drawn(short, long)
    # pi: input->m0 1 and 1, m0->logits 3/4 and 1/2, the edges of m1 1/4 and 1/2
    table = compare_circuits(left, right)
    assert table.loc["edges"].to_dict() == pytest.approx(
        {"left": 2.25, "right": 2.5, "shared": 2.0, "only_left": 0.25, "only_right": 0.5, "iou": 2 / 2.75}
    )
    assert table.loc["edges", "iou"] == pytest.approx(weighted_iou(left, right))
    assert table.loc["nodes", ["left", "right", "shared"]].tolist() == [1.25, 1.5, 1.25]


def test_an_ensemble_of_one_circuit_is_that_circuit():
    left = Circuit.from_edges(GRAPH, ["input->m0", "m0->a1.h0<q>", "a1.h0->logits"])
    right = Circuit.from_edges(GRAPH, ["input->m0", "m0->a1.h0<k>", "a1.h0->m1", "m1->logits"])
    expected = compare_circuits(left, right)
    assert (compare_circuits(certain(left), right) == expected).all(axis=None)
    assert (compare_circuits(certain(left), certain(right)) == expected).all(axis=None)
