"""Two circuits side by side, against counting by hand."""

from __future__ import annotations

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError
from kcwb.evaluation.compare import compare_circuits
from kcwb.models.graph import Graph

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
