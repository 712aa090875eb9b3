"""Shared machinery: counts and overlaps against brute force, and chance against chance."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import weighted_iou
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.evaluation.overlap import circuit_overlap, relation_matrix, shared_heads
from kcwb.models.graph import Graph
from kcwb.reading.roles import TOO_FEW, head_roles
from kcwb.tasks.task import make_task
from tests.ensembles import certain, drawn
from tests.handmade import additive

GRAPH = Graph(3, 4)


def table(**roles: str) -> pd.DataFrame:
    """A table of roles of all 12 heads: a1h2="mover" names one, the rest are `other`."""
    rows = [(f"a{layer}.h{head}", layer, head) for layer, head in product(range(3), range(4))]
    frame = pd.DataFrame(rows, columns=["node", "layer", "head"])
    frame["role"] = [roles.get(node.replace(".", ""), "other") for node in frame["node"]]
    named = frame["role"] != "other"
    return frame.assign(D_S=named * 1.0, D_R=named * -0.25, z=5.0)


def test_heads_that_serve_many_relations_come_first():
    tables = {
        "one": table(a2h1="mover", a0h0="relation"),
        "two": table(a2h1="mover", a1h3="suppressor"),
        "three": table(a2h1="mixture"),
    }
    found = shared_heads(GRAPH, tables).set_index("node")
    assert list(found.index) == ["a2.h1", "a0.h0", "a1.h3"]
    first = found.loc["a2.h1"]
    assert (first["relations"], first["of"]) == (3, 3)
    assert first["expected"] == pytest.approx(0.75) and first["p"] == pytest.approx(0.25**3)
    assert first["roles"] == "mover 2, mixture 1" and first["names"] == "one, two, three"
    assert found.loc["a0.h0", "p"] == pytest.approx(0.25)
    assert first["q"] == pytest.approx(min(12 * 0.25**3, 1.0))  # the smallest of 12


def test_in_a_layer_where_all_heads_serve_a_head_that_serves_says_nothing():
    full = {f"a2h{head}": "mover" for head in range(4)}
    found = shared_heads(GRAPH, {"one": table(**full), "two": table(**full)})
    assert (found["relations"] == 2).all() and found["p"].to_numpy() == pytest.approx(1.0)


def test_p_is_the_tail_over_all_ways_to_draw_the_heads():
    """Relations with 1, 2, 3 of a layer's four heads: every choice of them counted."""
    uses = [("a0h0",), ("a0h0", "a0h1"), ("a0h0", "a0h1", "a0h2")]
    found = shared_heads(GRAPH, {str(i): table(**dict.fromkeys(heads, "mover")) for i, heads in enumerate(uses)})
    ways = [sum(hits) for hits in product(*([True] * n + [False] * (4 - n) for n in (1, 2, 3)))]
    for row in found.itertuples():
        assert row.p == pytest.approx(np.mean([count >= row.relations for count in ways]))


def test_a_p_that_is_tiny_is_not_zero():
    found = shared_heads(Graph(1, 1000), {str(i): table(a0h0="mover") for i in range(12)})
    assert found["p"].tolist() == [pytest.approx(1e-36)]


def test_p_is_uniform_for_heads_drawn_at_random():
    """Random heads, two of each layer for each of six relations: p <= .05 at most as often as that."""
    draw, low, total = np.random.default_rng(0), 0, 0
    for _ in range(25):
        tables = {}
        for relation in range(6):
            chosen = {f"a{layer}h{head}": "mover" for layer in range(3) for head in draw.choice(4, 2, replace=False)}
            tables[str(relation)] = table(**chosen)
        found = shared_heads(GRAPH, tables)
        low, total = low + int((found["p"] <= 0.05).sum()), total + 12
    assert low / total <= 0.05


def test_too_few_relations_are_refused_and_those_without_roles_left_out():
    tables = {"one": table(a2h1="mover"), "two": table(a2h1="mover")}
    unsure = table().assign(role=TOO_FEW)
    assert len(shared_heads(GRAPH, {**tables, "three": unsure})) == 1
    with pytest.raises(DataError, match="at least two relations"):
        shared_heads(GRAPH, {"one": tables["one"], "three": unsure})
    assert shared_heads(GRAPH, {"one": table(), "two": table()}).empty


def test_a_matrix_holds_contributions_of_heads_with_a_role():
    matrix = relation_matrix({"one": table(a2h1="mover", a0h3="relation"), "two": table(a2h1="mover")})
    assert matrix.columns.tolist() == ["a0.h3", "a2.h1"] and matrix.index.tolist() == ["one", "two"]
    assert matrix.to_numpy().tolist() == [[0.75, 0.75], [0.0, 0.75]]
    assert relation_matrix({"one": table(a2h1="mover")}, "z").loc["one", "a2.h1"] == 5.0
    with pytest.raises(SettingError, match="no column of numbers 'role'"):
        relation_matrix({"one": table(a2h1="mover")}, "role")
    with pytest.raises(SettingError, match="no column of numbers 'zz'"):
        relation_matrix({"one": table(a2h1="mover")}, "zz")
    with pytest.raises(DataError, match="No head has a role"):
        relation_matrix({"one": table()})


def test_heads_in_fewer_than_half_of_the_draws_serve_nothing():
    roles = table(a2h1="mover", a0h3="relation")
    sure = roles.assign(pi=[0.49 if node == "a0.h3" else 0.5 for node in roles["node"]])
    assert set(shared_heads(GRAPH, {"one": sure, "two": sure})["node"]) == {"a2.h1"}
    pd.testing.assert_frame_equal(
        shared_heads(GRAPH, {"one": roles.assign(pi=1.0), "two": roles})[["node", "p", "q"]],
        shared_heads(GRAPH, {"one": roles, "two": roles})[["node", "p", "q"]],
    )


def test_a_matrix_holds_means_over_draws():
    roles = table(a2h1="mover", a0h3="relation")
    unsure = roles.assign(pi=[0.25 if node == "a0.h3" else 1.0 for node in roles["node"]])
    tables = {"one": unsure, "two": roles}
    assert relation_matrix(tables).to_numpy().tolist() == [[0.75 / 4, 0.75], [0.75, 0.75]]
    assert relation_matrix(tables, "D_S").loc["one"].tolist() == [0.25, 1.0]
    assert relation_matrix({"one": unsure}, "pi").loc["one"].tolist() == [0.25, 1.0]


# --- overlap ---


def test_a_circuit_overlaps_with_itself_entirely_and_with_chance_by_chance():
    graph = Graph(6, 8)
    same = random_circuit(graph, 40, seed=100)
    overlap = circuit_overlap({"a": same, "b": same, "c": random_circuit(graph, 40, seed=101)}, progress=False)
    ab, ac, bc = (overlap[(overlap["left"] == x) & (overlap["right"] == y)].iloc[0] for x, y in ("ab", "ac", "bc"))
    assert ab["edges"] == ab["nodes"] == ab["heads"] == 1.0
    assert ab["p_edges"] == pytest.approx(1 / 21) and ab["p_heads"] == pytest.approx(1 / 1001)
    for column in ("edges", "nodes", "heads"):
        assert ac[column] == bc[column] and ac[f"p_{column}"] > 0.02


def test_random_overlap_of_nodes_is_that_of_other_heads_of_the_same_layers():
    graph = Graph(6, 8)
    left, right = random_circuit(graph, 30, seed=1), random_circuit(graph, 60, seed=2)
    row = circuit_overlap({"l": left, "r": right}, draws=3, progress=False).iloc[0]
    heads = [set(c.nodes.loc[c.nodes["kind"] == "head", "node"]) for c in (left, right)]
    assert row["heads"] == pytest.approx(len(heads[0] & heads[1]) / len(heads[0] | heads[1]))
    draw, values = np.random.default_rng(5), []
    for _ in range(1000):
        others: set[str] = set()
        for layer in range(6):
            here = sum(name.startswith(f"a{layer}.") for name in heads[1])
            others |= {f"a{layer}.h{head}" for head in draw.choice(8, here, replace=False)}
        values.append(len(heads[0] & others) / len(heads[0] | others))
    assert row["random_heads"] == pytest.approx(np.mean(values), abs=0.02)
    nodes = [set(c.nodes.loc[c.nodes["kind"].isin(["head", "mlp"]), "node"]) for c in (left, right)]
    assert row["nodes"] == pytest.approx(len(nodes[0] & nodes[1]) / len(nodes[0] | nodes[1]))


def test_heads_of_unrelated_circuits_are_not_called_shared():
    graph = Graph(6, 8)
    for size in (30, 150):
        circuits = {f"{i}": random_circuit(graph, size, seed=i) for i in range(16)}
        overlap = circuit_overlap(circuits, draws=1, progress=False)
        assert (overlap["p_heads"] <= 0.1).mean() <= 0.15, size


def test_an_ensemble_of_one_circuit_overlaps_as_that_circuit_does():
    graph = Graph(6, 8)
    circuits = {name: random_circuit(graph, 30 + 5 * i, seed=i) for i, name in enumerate("abc")}
    expected = circuit_overlap(circuits, draws=5, progress=False)
    for some in ("abc", "b"):
        mixed = {name: certain(one) if name in some else one for name, one in circuits.items()}
        pd.testing.assert_frame_equal(circuit_overlap(mixed, draws=5, progress=False), expected)


def test_the_overlap_of_ensembles_is_weighted_and_stands_beside_chance_of_the_same_pi():
    graph = Graph(6, 8)
    left, right = (drawn(*(random_circuit(graph, 40, seed=10 * side + i) for i in range(4))) for side in (1, 2))
    row = circuit_overlap({"l": left, "r": right}, draws=1, progress=False).iloc[0]
    assert row["edges"] == pytest.approx(weighted_iou(left, right))
    a, b = (one.nodes.set_index("node") for one in (left, right))
    heads = pd.concat([a.loc[a["kind"] == "head", "pi"], b.loc[b["kind"] == "head", "pi"]], axis=1).fillna(0.0)
    assert row["heads"] == pytest.approx(heads.min(axis=1).sum() / heads.max(axis=1).sum())
    same = circuit_overlap({"l": left, "r": left}, draws=9, progress=False).iloc[0]
    assert same["edges"] == same["heads"] == 1.0 and np.isnan(same["p_edges"])


def test_circuits_of_other_graphs_and_empty_ones_are_refused():
    one = random_circuit(GRAPH, 10, seed=0)
    with pytest.raises(CircuitError, match="'b' has no edges"):
        circuit_overlap({"a": one, "b": Circuit.empty(GRAPH)}, progress=False)
    with pytest.raises(CircuitError, match="'b' is part of"):
        circuit_overlap({"a": one, "b": random_circuit(Graph(2, 4), 10, seed=0)}, progress=False)
    with pytest.raises(SettingError, match="needs at least 2"):
        circuit_overlap({"a": one}, progress=False)


# --- together ---


def test_two_relations_of_one_model_share_the_mover_and_part_at_the_mixture():
    """The hand-built model answers capitals and languages: mover and relation head serve both."""
    tables = {}
    for asks in ("capital", "language"):
        found = additive(asks)
        roles = head_roles(found.model, None, make_task(found.model, found.relation, n=8), progress=False)
        large = roles["D_S"].abs() + roles["D_R"].abs() > 0.5
        tables[asks] = roles.assign(role=roles["role"].where(large, "other"))
    shared = shared_heads(found.model.graph, tables).set_index("node")
    assert shared["relations"].to_dict() == {"a1.h0": 2, "a1.h1": 2, "a1.h2": 2, "a1.h3": 1}
    assert shared.loc["a1.h1", "roles"] == "mover 2" and shared.loc["a1.h3", "names"] == "capital"
    matrix = relation_matrix(tables)
    assert matrix.shape == (2, 4) and (matrix["a1.h0"] < 0).all() and matrix.loc["language", "a1.h3"] == 0


def test_no_relations_have_no_matrix():
    with pytest.raises(DataError, match="no relations"):
        relation_matrix({})
