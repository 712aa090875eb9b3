"""Which edges a name stands for."""

from __future__ import annotations

import pytest

from kcwb.circuits.naming import edges_named
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph

GRAPH = Graph(2, 2)
GROUPS = {"both": ["m0", "a1.h1"], "odd -> name": ["m1"]}


def named(name):
    return {GRAPH.edge_name(*place) for place in edges_named(GRAPH, name, GROUPS, "cut").nonzero().tolist()}


def test_an_edge_is_itself_or_those_to_query_key_and_value():
    assert named("m0->a1.h1<q>") == {"m0->a1.h1<q>"}
    assert named("m0->a1.h1") == {f"m0->a1.h1<{letter}>" for letter in "qkv"}
    assert named("m0->logits") == {"m0->logits"}


@pytest.mark.parametrize("node", GRAPH.node_names)
def test_a_node_is_all_edges_at_it(node):
    every = {GRAPH.edge_name(*place) for place in GRAPH.exists.nonzero().tolist()}
    expected = {edge for edge in every if node in (edge.split("->")[0], edge.split("->")[1].split("<")[0])}
    assert named(node) == expected


def test_a_group_is_all_edges_at_its_nodes_whatever_its_name_looks_like():
    assert named("both") == named("m0") | named("a1.h1")
    assert named("odd -> name") == named("m1")


@pytest.mark.parametrize("name", ["m0->m0", "m0 -> m1", "logits->m0", "->", "", "bot", "m0->input", "a0.h0->a0.h1<q>"])
def test_what_is_no_name_is_told_in_one_line(name):
    with pytest.raises(CircuitError, match=r"^cut: [^\n]{10,300}$"):
        named(name)
