"""Circuits of other tools: what is written is what they read, and what they wrote is read or refused in words."""

from __future__ import annotations

import contextlib
import json
import math
import time

import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.interchange import from_mib, load_gv, load_mib, save_mib, to_mib
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph

GRAPHS = [Graph(1, 1), Graph(2, 3), Graph(3, 2, parallel=True)]
CFG = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False}


def random_circuit(graph: Graph, seed: int, scored: float) -> Circuit:
    """Random edges; each scored with a probability."""
    draw = torch.Generator().manual_seed(seed)
    kept = graph.exists & (torch.rand(graph.exists.shape, generator=draw) < 0.4)
    scores = torch.randn(graph.exists.shape, generator=draw)
    has = graph.exists & (torch.rand(graph.exists.shape, generator=draw) < scored)
    return Circuit(graph, kept, scores.where(has, torch.tensor(math.nan)), {"method": "random", "seed": seed})


def assert_same(left: Circuit, right: Circuit) -> None:
    assert left.graph == right.graph
    assert torch.equal(left.kept, right.kept)
    assert dict(left.provenance) == dict(right.provenance)
    assert (left.scores is None) == (right.scores is None)
    if left.scores is not None and right.scores is not None:
        torch.testing.assert_close(left.scores, right.scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("scored", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_round_trip_loses_nothing(tmp_path, graph: Graph, scored: float, seed: int) -> None:
    circuit = random_circuit(graph, seed, scored)
    save_mib(circuit, tmp_path / "circuit.json", d_model=8)
    assert_same(load_mib(tmp_path / "circuit.json"), circuit)


@pytest.mark.parametrize("make", [Circuit.empty, Circuit.full])
def test_a_circuit_without_scores_stays_without(make) -> None:
    circuit = make(Graph(2, 2))
    back = from_mib(json.loads(json.dumps(to_mib(circuit))))
    assert torch.equal(back.kept, circuit.kept) and back.scores is None


def test_what_is_written_has_the_form_that_eap_ig_reads(tmp_path) -> None:
    """Its from_json takes `cfg` with d_model, `in_graph` of nodes, `score` (a number) and `in_graph` of edges."""
    graph = Graph(2, 2)
    circuit = Circuit.from_edges(graph, {"input->a1.h0<k>": 0.5, "a1.h0->logits": -2.0})
    save_mib(circuit, tmp_path / "circuit.json", d_model=16)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "circuit.json").read_text(), parse_constant=refuse)
    assert data["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 16}
    assert list(data["nodes"]) == list(graph.node_names)
    assert [name for name, node in data["nodes"].items() if node["in_graph"]] == ["input", "a1.h0", "logits"]
    assert len(data["edges"]) == graph.n_edges
    assert data["edges"]["input->a1.h0<k>"] == {"score": 0.5, "in_graph": True}
    assert data["edges"]["input->m0"] == {"score": 0.0, "in_graph": False, "scored": False}
    assert all(type(edge["score"]) is float and type(edge["in_graph"]) is bool for edge in data["edges"].values())


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path) -> None:
    infinite = Circuit.from_edges(Graph(1, 1), {"input->logits": math.inf})
    foreign = Circuit(Graph(1, 1), Circuit.full(Graph(1, 1)).kept, provenance={"model": object()})
    for circuit in (infinite, foreign):
        with pytest.raises(CircuitError, match="cannot be written as JSON"):
            save_mib(circuit, tmp_path / "circuit.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(CircuitError, match="cannot be saved as"):
        save_mib(Circuit.empty(Graph(1, 1)), tmp_path / "file" / "circuit.json")


@pytest.mark.parametrize("theirs", ['{"cells": []}', '{"cfg": {}, "nodes": {}, "edges": {}}'])
def test_a_file_that_is_no_mib_circuit_of_ours_is_kept(tmp_path, theirs: str) -> None:
    path, circuit = tmp_path / "circuit.json", Circuit.from_edges(Graph(1, 1), ["input->m0"], provenance={"n": 1})
    path.write_text(theirs)
    with pytest.raises(CircuitError, match="is left as it is"):
        save_mib(circuit, path)
    assert path.read_text() == theirs
    save_mib(Circuit.empty(Graph(1, 1)), path, force=True)
    save_mib(circuit, path)  # its own is overwritten
    assert_same(load_mib(path), circuit)


def test_d_model_survives_a_round_trip_of_a_foreign_file() -> None:
    data = {"cfg": {**CFG, "d_model": 64}, "edges": {"input->logits": {"score": 1.0, "in_graph": True}}}
    assert to_mib(from_mib(data))["cfg"]["d_model"] == 64
    assert "d_model" not in to_mib(Circuit.empty(Graph(1, 1)))["cfg"]
    found = Circuit(Graph(1, 1), Graph(1, 1).exists, provenance={"model": {"name": "m", "d_model": 48}})
    assert to_mib(found)["cfg"]["d_model"] == 48
    assert to_mib(found, d_model=32)["cfg"]["d_model"] == 32


def test_nodes_as_booleans_and_scores_of_null_are_read() -> None:
    """EAP-IG's form until 2024."""
    edges = {"input->m0": {"score": None, "in_graph": True}, "m0->logits": {"score": math.nan, "in_graph": False}}
    circuit = from_mib({"cfg": CFG, "nodes": {"input": True, "m0": False}, "edges": edges})
    assert circuit.n_edges == 1 and circuit.scores is None


def test_membership_alone_is_read() -> None:
    edges = {"input->m0": {"in_graph": True}, "m0->logits": {"in_graph": False}}
    for form in (edges, {name: edge["in_graph"] for name, edge in edges.items()}):
        circuit = from_mib({"cfg": CFG, "nodes": {}, "edges": form})
        assert circuit.edges["sender"].tolist() == ["input"] and circuit.scores is None


def test_scores_alone_keep_all_that_is_listed_and_can_be_resized() -> None:
    graph = Graph(2, 2)
    plain = {graph.edge_name(*index): float(i) for i, index in enumerate(graph.exists.nonzero().tolist())}
    for form in (plain, {name: {"score": score} for name, score in plain.items()}):
        circuit = from_mib({"cfg": CFG, "edges": form})
        assert circuit.n_edges == graph.n_edges
        assert resize(circuit, threshold=max(plain.values())).n_edges <= 1
    part = from_mib({"cfg": CFG, "edges": {"input->m0": 0.5, "m0->logits": 1}})
    assert part.n_edges == 2 and part.edges["score"].tolist() == [1.0, 0.5]


def test_neurons_that_are_all_kept_are_read_and_others_refused() -> None:
    edges = {"input->m0": {"score": 1.0, "in_graph": True}}
    whole = {"cfg": CFG, "nodes": {"m0": {"in_graph": True, "neurons": [True, True]}}, "edges": edges}
    assert from_mib(whole).n_edges == 1
    with pytest.raises(CircuitError, match=r"nodes, m0, neurons: this circuit keeps some of a node's neurons"):
        from_mib({**whole, "nodes": {"m0": {"in_graph": True, "neurons": [True, False]}}})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"edges": {"input->m7": {"score": 1.0, "in_graph": True}}}, "edges: 'm7' is not a receiver of the graph of 2"),
        ({"edges": {"input->a0.h2<q>": True}}, "'a0.h2<q>' is not a receiver"),
        ({"edges": {"m1->a0.h0<q>": True}}, "has no edge 'm1->a0.h0<q>'"),
        ({"edges": {"a0.h0->m0": True}, "cfg": {**CFG, "parallel_attn_mlp": True}}, "parallel blocks has no edge"),
        ({"edges": {"input": True}}, "'input' is not an edge"),
        ({"edges": {"input->a0.h0": True}}, "'a0.h0' is not a receiver"),
        ({"edges": {"input->m0": "much"}}, "edges, 'input->m0', score: expected a number, found 'much'"),
        ({"edges": {"input->m0": {"score": [1]}}}, "score: expected a number"),
        ({"edges": {"input->m0": {"score": True}}}, "score: expected a number"),
        ({"edges": {"input->m0": math.inf}}, "not a finite number"),
        ({"edges": {"input->m0": 10**400}}, "not a finite number"),
        ({"edges": {"input->m0": 1e39}}, "not a finite number of single precision"),
        ({"edges": {"input->m0": {"score": 1.0, "in_graph": "yes"}}}, "in_graph: expected true or false, found 'yes'"),
        ({"edges": {"input->m0": True, "m0->logits": 0.5}}, "'m0->logits': other edges say whether they are in_graph"),
        ({"edges": ["input->m0"]}, "edges: expected an object"),
        ({"nodes": {"m9": {"in_graph": True}}}, "nodes: 'm9' is not a node"),
        ({"nodes": []}, "nodes: expected an object"),
        ({"cfg": {**CFG, "n_layers": 0}}, "cfg, n_layers: expected a whole number from 1 on, found 0"),
        ({"cfg": {**CFG, "n_heads": True}}, "cfg, n_heads"),
        ({"cfg": {**CFG, "n_heads": 10**9}}, "no model has 2 layers of 1000000000 heads"),
        ({"cfg": {"n_layers": 2, "n_heads": 2}}, "cfg, parallel: expected true or false, found None"),
        ({"cfg": 3}, "cfg, n_layers"),
        ({"provenance": "me"}, "provenance: expected an object"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_with_its_place(tmp_path, change: dict, message: str) -> None:
    data = {"cfg": CFG, "nodes": {}, "edges": {}, **change}
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CircuitError) as error:
        load_mib(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_circuits_of_nodes_and_other_files_are_refused(tmp_path) -> None:
    with pytest.raises(CircuitError, match="no 'edges': a circuit of nodes alone"):
        from_mib({"cfg": CFG, "nodes": {"m0": {"in_graph": True, "score": 1.0}}})
    for data in ([], {}, 3, {"edges": {}}):
        with pytest.raises(CircuitError, match="is not a circuit of MIB"):
            from_mib(data)
    path = tmp_path / "circuit.json"
    path.write_text('{"cfg":\n oops')
    with pytest.raises(CircuitError, match=r"circuit\.json, line 2, column 2: not JSON"):
        load_mib(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CircuitError, match="not JSON"):
        load_mib(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(CircuitError, match="is not JSON"):
        load_mib(path)
    with pytest.raises(CircuitError, match="cannot be read"):
        load_mib(tmp_path / "nowhere.json")


def test_pickles_are_refused_unread(tmp_path) -> None:
    for name in ("circuit.pt", "circuit.json"):  # by name, and by content
        torch.save({"cfg": CFG}, tmp_path / name)
        with pytest.raises(CircuitError, match="can run code when it is read"):
            load_mib(tmp_path / name)


def test_a_circuit_of_another_model_is_refused_where_it_is_used(tiny, words) -> None:
    from kcwb.circuits.ablation import make_ablation
    from kcwb.circuits.run import run_circuit
    from kcwb.tasks.task import make_task

    model = tiny("gpt2")
    task = make_task(model, words, n=2)
    foreign = from_mib({"cfg": CFG, "edges": {"input->logits": True}})
    with pytest.raises(CircuitError, match="2 layers with 2 heads"):
        run_circuit(model, foreign, task.val, make_ablation(model, task, "zero"))


def test_large_circuits_convert_in_seconds() -> None:
    circuit = Circuit.full(Graph(12, 12))
    assert from_mib(to_mib(circuit)).n_edges == 32_491


DRAWING = """strict digraph "" {
\tgraph [bb="0,0,7033.1,1548",
\t\tbgcolor=transparent,
\t\tlayout=dot
\t];
\tnode [label="\\N"];
\t"<a1.1>"\t[color=black,
\t\tfillcolor="#cccccc",
\t\tpos="6968.1,378"];
\t"<resid_post>"\t[color=black];
\t"<a1.1>" -> "<resid_post>"\t[color="#cccccc",
\t\tpenwidth=0.6,
\t\tpos="e,2911.9,18.942 6965.5,359.56 6961.7,332.82; 6955.1 -> \\
6629.1,72"];
\tembed\t[color=black];
\tembed -> "<m0>"\t[color="#fdcdac",
\t\tpenwidth=3.98690402507782];
\t"<m0>" -> "<a1.1>"\t[penwidth=0.6];
\t"<m0>" -> "<m1>";
\t"<m1>" -> "<resid_post>";
}
"""


def test_a_released_drawing_is_read(tmp_path) -> None:
    """The form of the released graph.gv, shortened: a line into a head may mean its query, key or value."""
    path = tmp_path / "graph.gv"
    path.write_text(DRAWING)
    circuit = load_gv(path, Graph(2, 2))
    expected = ["a1.h1->logits", "input->m0", "m0->m1", "m1->logits"]
    expected += [f"m0->a1.h1<{letter}>" for letter in "qkv"]
    assert sorted(circuit.edges["sender"] + "->" + circuit.edges["receiver"]) == sorted(expected)
    assert circuit.scores is None
    assert circuit.provenance["merged_qkv"] == 1 and circuit.provenance["file"] == "graph.gv"


def test_letters_that_a_drawing_names_are_read_and_self_loops_are_not_edges(tmp_path) -> None:
    path = tmp_path / "graph.gv"
    path.write_text('digraph { "<m0>" -> "<a1.1_k>" -> "<a1.1>"; "<embed>" -> "<m0>" }')
    circuit = load_gv(path, Graph(2, 2))
    assert sorted(circuit.edges["receiver"]) == ["a1.h1<k>", "m0"]
    assert circuit.provenance["merged_qkv"] == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("graph { a -- b }", "not a whole graphviz file"),
        ('digraph { "<m0>" -> ', "not a whole graphviz file"),
        ('digraph {\n"<m0>";\n "<mlp 0>" -> "<m1>";\n}', "line 3: 'mlp 0' is not understood"),
        ('digraph {\ntoken_embeds -> "<m0>";}', "line 2: 'token_embeds' is not understood"),
        ('digraph {\n\n"<m0>" -> "<a7.1>"}', "line 3: 'a7.h1<q>' is not a receiver of the graph of 2 layers"),
        ('digraph {"<m1>" -> "<m0>"}', "line 1: the graph of 2 layers with 2 heads has no edge 'm1->m0'"),
        ('digraph {subgraph x {"<m0>" -> "<m1>"}}', "line 1: "),
        ('digraph {"<m0>" -> }', "line 1: '' is not understood"),
        ('digraph {"<resid_post>" -> "<m1>"}', "line 1: 'logits' is not a sender"),
        ("", "not a whole graphviz file"),
    ],
)
def test_what_a_drawing_should_not_hold_is_named_with_its_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "graph.gv"
    path.write_text(text)
    with pytest.raises(CircuitError) as error:
        load_gv(path, Graph(2, 2))
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_drawing_that_is_missing_or_binary_is_refused(tmp_path) -> None:
    with pytest.raises(CircuitError, match="cannot be read"):
        load_gv(tmp_path / "graph.gv", Graph(1, 1))
    (tmp_path / "graph.gv").write_bytes(b"\x80\x04")
    with pytest.raises(CircuitError, match="not UTF-8"):
        load_gv(tmp_path / "graph.gv", Graph(1, 1))


@pytest.mark.parametrize(
    "inside",
    [
        "[" * 40_000,
        '["' * 100_000,
        '["\\' * 100_000,
        "[]" * 200_000,
        "\n" * 500_000,
        "m0 -> m1;\n" * 90_000,
        ";" * 500_000,
    ],
    ids=["brackets", "quotes", "escapes", "empty lists", "lines", "edges", "statements"],
)
def test_a_hostile_drawing_takes_time_in_proportion_to_its_length(tmp_path, inside: str) -> None:
    """Each would take minutes to hours where a place is looked at once for every other."""
    path = tmp_path / "graph.gv"
    path.write_text(f"digraph {{\n{inside}}}")
    started = time.process_time()
    with contextlib.suppress(CircuitError):
        assert load_gv(path, Graph(2, 2)).n_edges <= 1
    assert time.process_time() - started < 5


def test_a_list_of_attributes_without_end_is_named_with_its_line(tmp_path) -> None:
    path = tmp_path / "graph.gv"
    path.write_text('digraph {\n m0 [label="a;b\\"]"];\n m1 [label="c];\n}')
    with pytest.raises(CircuitError, match="line 3: the list of attributes that opens here never ends"):
        load_gv(path, Graph(2, 2))
