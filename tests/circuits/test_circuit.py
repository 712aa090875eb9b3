"""Circuits: set algebra, tables, dangling edges, and files that are either right or refused."""

from __future__ import annotations

import json
import math
import os
from collections import Counter

import networkx as nx
import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph

GRAPHS = [Graph(2, 3), Graph(2, 3, parallel=True), Graph(4, 2), Graph(1, 1)]
GRAPH = GRAPHS[0]


def random_circuit(graph=GRAPH, seed=0, share=0.2, scored=False, **more) -> Circuit:
    """Any subset of the edges, dangling ones too."""
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(graph.exists.shape, generator=generator) < share) & graph.exists
    scores = torch.randn(kept.shape, generator=generator).masked_fill(~graph.exists, math.nan) if scored else None
    return Circuit(graph, kept, scores, **more)


def names(circuit: Circuit) -> set[str]:
    """The kept edges by a plain loop over the mask."""
    graph = circuit.graph
    return {
        f"{sender}->{receiver}"
        for i, sender in enumerate(graph.sender_names)
        for j, receiver in enumerate(graph.receiver_names)
        if circuit.kept[i, j]
    }


def node_of(receiver: str) -> str:
    return receiver.split("<")[0]


def network(edges) -> nx.MultiDiGraph:
    """Edges between nodes, as networkx has them."""
    found = nx.MultiDiGraph()
    found.add_nodes_from(["input", "logits"])
    found.add_edges_from((edge.split("->")[0], node_of(edge.split("->")[1])) for edge in sorted(edges))
    return found


def same_scores(a, b) -> bool:
    return (a is None and b is None) or (
        a is not None and b is not None and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    )


# Sets of edges


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_algebra_is_that_of_sets_of_edges(graph, seed):
    a, b = random_circuit(graph, seed, 0.4), random_circuit(graph, seed + 100, 0.3)
    everything = names(Circuit.full(graph))
    assert len(everything) == graph.n_edges == Circuit.full(graph).n_edges
    assert names(Circuit.empty(graph)) == set()
    assert a.n_edges == len(names(a))
    assert names(a | b) == names(a) | names(b)
    assert names(a & b) == names(a) & names(b)
    assert names(a - b) == names(a) - names(b)
    assert names(a.complement()) == everything - names(a)
    assert a.iou(b) == b.iou(a) == len(names(a) & names(b)) / len(names(a) | names(b))


def test_iou_of_a_circuit_with_itself_is_one_and_of_disjoint_ones_zero():
    a = random_circuit()
    assert a.iou(a) == 1 and a.iou(a.complement()) == 0
    assert Circuit.empty(GRAPH).iou(Circuit.empty(GRAPH)) == 1
    assert Circuit.empty(GRAPH).iou(a) == 0


def test_algebra_leaves_its_operands_alone():
    a, b = random_circuit(seed=1), random_circuit(seed=2)
    before = names(a), names(b)
    for merged in (a | b, a & b, a - b, a.complement(), a.without_dangling()):
        merged.kept.fill_(False)
    assert (names(a), names(b)) == before


def test_a_union_has_the_score_of_the_circuit_that_an_edge_comes_from():
    a = Circuit.from_edges(GRAPH, {"input->m0": 1.0, "m0->logits": 2.0})
    b = Circuit.from_edges(GRAPH, {"m0->logits": 5.0, "m1->logits": 3.0})
    table = (a | b).edges.set_index(["sender", "receiver"])["score"].to_dict()
    assert table == {("input", "m0"): 1.0, ("m0", "logits"): 2.0, ("m1", "logits"): 3.0}
    a, b = random_circuit(seed=1, scored=True), random_circuit(seed=2, scored=True)  # scored where they cut, too
    for edge in (a | b).edges.itertuples():
        index = GRAPH.edge_index(f"{edge.sender}->{edge.receiver}")
        assert edge.score == float((a if a.kept[index] else b).scores[index])


def test_algebra_records_its_operands():
    model = {"name": "m", "digest": "d"}
    a = random_circuit(seed=1, provenance={"method": "eap", "model": model})
    b = random_circuit(seed=2, provenance={"method": "acdc", "model": model})
    found = (a - b).provenance
    assert [part["method"] for part in found["of"]] == ["eap", "acdc"] and found["model"] == model
    other = random_circuit(seed=2, provenance={"model": {"name": "n", "digest": "e"}})
    assert "model" not in (a | other).provenance


def test_algebra_keeps_what_cut_edges_delivered():
    """So that what is evaluated under a circuit's own ablation is not evaluated under zero instead."""
    model = {"name": "m", "digest": "d"}
    a = random_circuit(seed=1, provenance={"method": "eap", "ablation": "mean", "model": model})
    b = random_circuit(seed=2, provenance={"method": "gim", "ablation": "mean"})
    for merged in (a | b, a & b, a - b, a.complement(), a & random_circuit(seed=3), Circuit.full(GRAPH) - a):
        assert merged.ablation == "mean"
    assert a.complement().provenance["model"] == model and "model" not in (a | b).provenance
    other = random_circuit(seed=2, provenance={"method": "acdc", "ablation": "resample"})
    assert "ablation" not in (a | other).provenance  # nothing is right for both


@pytest.mark.parametrize("other", [Graph(2, 4), Graph(3, 3), Graph(2, 3, parallel=True)], ids=str)
def test_circuits_of_different_graphs_do_not_combine(other):
    for combine in (Circuit.__or__, Circuit.__and__, Circuit.__sub__, Circuit.iou):
        with pytest.raises(CircuitError, match="different graphs"):
            combine(random_circuit(), random_circuit(other))


# Dangling edges


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_without_dangling_keeps_just_the_edges_on_a_path_from_input_to_logits(graph, share, seed):
    circuit = random_circuit(graph, seed, share, scored=True, provenance={"method": "x"})
    whole = network(names(circuit))
    after = nx.descendants(whole, "input") | {"input"}
    before = nx.ancestors(whole, "logits") | {"logits"}
    expected = {
        edge for edge in names(circuit) if edge.split("->")[0] in after and node_of(edge.split("->")[1]) in before
    }
    found = circuit.without_dangling()
    assert names(found) == expected
    assert names(found.without_dangling()) == expected
    assert same_scores(found.scores, circuit.scores) and found.provenance == circuit.provenance


def test_a_circuit_without_a_path_is_all_dangling():
    assert Circuit.from_edges(GRAPH, ["input->m0", "m0->m1", "a0.h0->logits"]).without_dangling().n_edges == 0
    full = Circuit.full(GRAPH)
    assert names(full.without_dangling()) == names(full)


# Tables


def test_edges_are_sorted_by_strength_with_unscored_ones_last():
    table = Circuit.from_edges(
        GRAPH, {"input->m0": 0.5, "m0->m1": math.nan, "m1->logits": -2.0, "input->a0.h1<k>": 1.0}
    ).edges
    assert (table["sender"] + "->" + table["receiver"]).tolist() == [
        "m1->logits",
        "input->a0.h1<k>",
        "input->m0",
        "m0->m1",
    ]
    assert table["score"].tolist()[:3] == [-2.0, 1.0, 0.5] and math.isnan(table["score"][3])


@pytest.mark.parametrize("scored", [True, False])
def test_edges_are_all_the_kept_ones_with_their_scores(scored):
    circuit = random_circuit(scored=scored)
    table = circuit.edges
    assert list(table.columns) == ["sender", "receiver", "score"]
    assert set(table["sender"] + "->" + table["receiver"]) == names(circuit) and len(table) == circuit.n_edges
    for edge in table.itertuples():
        if scored:
            assert edge.score == float(circuit.scores[GRAPH.edge_index(f"{edge.sender}->{edge.receiver}")])
        else:
            assert math.isnan(edge.score)


def test_scores_of_half_precision_and_with_a_gradient_are_taken_as_numbers(tmp_path):
    scores = torch.linspace(-1, 1, GRAPH.exists.numel()).reshape(GRAPH.exists.shape).bfloat16()
    circuit = Circuit(GRAPH, GRAPH.exists, scores.requires_grad_())
    assert circuit.edges["score"].tolist() == sorted(scores[GRAPH.exists].tolist(), key=abs, reverse=True)
    circuit.save(tmp_path / "circuit.json")
    assert torch.equal(Circuit.load(tmp_path / "circuit.json").scores, scores.detach().float())


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("share", [0.03, 0.3])
def test_nodes_count_and_weigh_their_edges(graph, share):
    circuit = random_circuit(graph, seed=3, share=share, scored=True)
    into, out, strength = Counter(), Counter(), Counter()
    for edge in names(circuit):
        sender, receiver = edge.split("->")
        score = abs(float(circuit.scores[graph.edge_index(edge)]))
        into[node_of(receiver)] += 1
        out[sender] += 1
        strength[sender] += score
        if receiver == "logits":
            strength["logits"] += score
    table = circuit.nodes
    assert table["node"].tolist() == [name for name in graph.node_names if into[name] + out[name]]
    for node in table.itertuples():
        assert (node.in_edges, node.out_edges) == (into[node.node], out[node.node])
        assert node.score == pytest.approx(strength[node.node], abs=1e-5)
        place = graph.node(node.node)
        assert (node.kind, node.layer, node.head) == (place.kind, place.layer, place.head)
    inner = [name for name in table["node"] if name not in ("input", "logits")]
    assert circuit.n_nodes == len(inner)


def test_nodes_of_an_unscored_circuit_have_no_strength():
    assert random_circuit().nodes["score"].tolist() == [0.0] * len(random_circuit().nodes)
    assert len(Circuit.empty(GRAPH).nodes) == len(Circuit.empty(GRAPH).edges) == 0


def test_the_node_matrix_counts_parallel_edges():
    edges = ["input->a0.h0<q>", "input->a0.h0<k>", "a0.h0->logits"]
    matrix = Circuit.from_edges(GRAPH, edges).node_matrix
    place = {name: i for i, name in enumerate(GRAPH.node_names)}
    assert matrix[place["input"], place["a0.h0"]] == 2 and matrix[place["a0.h0"], place["logits"]] == 1
    assert matrix.sum() == 3


# What is refused


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (torch.zeros(3, 3, dtype=torch.bool), r"shape \(9, 21\).*\(3, 3\)"),
        (torch.zeros(GRAPH.exists.shape), "boolean.*float32"),
        (GRAPH.exists.T.clone(), r"shape \(9, 21\).*\(21, 9\)"),
        (torch.ones(GRAPH.exists.shape, dtype=torch.bool), "has no edge a0.h0->a0.h0<q>"),
    ],
    ids=["shape", "type", "transposed", "edges that are not there"],
)
def test_a_mask_that_does_not_fit_the_graph_is_refused(kept, words):
    with pytest.raises(CircuitError, match=words):
        Circuit(GRAPH, kept)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(CircuitError, match=r"scores must have shape \(9, 21\).*\(2, 2\)"):
        Circuit(GRAPH, GRAPH.exists.clone(), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        ("input", "not an edge"),
        ("nobody->m0", "'nobody' is not a sender"),
        ("logits->m0", "'logits' is not a sender"),
        ("input->a0.h0", "'a0.h0' is not a receiver"),
        ("input->a0.h3<q>", "'a0.h3<q>' is not a receiver"),
        ("m0->a0.h0<q>", "no edge 'm0->a0.h0<q>'.*not computed before"),
        ("a0.h0->a0.h1<v>", "not computed before"),
        ("m1->m1", "not computed before"),
    ],
)
def test_an_edge_that_is_not_of_the_graph_is_refused_by_name(edge, words):
    with pytest.raises(CircuitError, match=words):
        Circuit.from_edges(GRAPH, ["input->m0", edge])


def test_from_edges_keeps_those_edges_and_scores():
    assert names(Circuit.from_edges(GRAPH, ["input->m0", "input->m0"])) == {"input->m0"}
    assert Circuit.from_edges(GRAPH, ["input->m0"]).scores is None
    scored = Circuit.from_edges(GRAPH, {"input->m0": 2.5}, provenance={"method": "by hand"})
    assert scored.scores[GRAPH.edge_index("input->m0")] == 2.5 and int(scored.scores.isnan().sum()) == 9 * 21 - 1
    assert scored.provenance == {"method": "by hand"}


# Files


def saved(tmp_path, circuit=None, name="circuit.json"):
    path = tmp_path / name
    (circuit or random_circuit(scored=True, provenance={"method": "x"})).save(path)
    return path


def scores_file(tmp_path):
    (found,) = tmp_path.glob("*.safetensors")
    return found


def edited(path, change):
    """Change a circuit's file by hand."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def assert_same(found: Circuit, expected: Circuit):
    assert found.graph == expected.graph and found.kept.equal(expected.kept)
    assert same_scores(found.scores, expected.scores)
    assert dict(found.provenance) == dict(expected.provenance)


PROVENANCE = {
    "method": "x",
    "model": {"name": "Ä", "digest": "0"},
    "facts": [["<b>", "日本"]],
    "loss": 0.1,
    "none": None,
}


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("scored", [True, False])
def test_a_circuit_is_saved_and_loaded_bit_for_bit(tmp_path, graph, scored):
    circuit = random_circuit(graph, scored=scored, provenance=PROVENANCE)
    assert_same(Circuit.load(saved(tmp_path, circuit)), circuit)


@pytest.mark.parametrize("make", [Circuit.empty, Circuit.full])
def test_the_empty_and_the_full_circuit_are_saved_and_loaded(tmp_path, make):
    assert_same(Circuit.load(saved(tmp_path, make(GRAPH))), make(GRAPH))


def test_scores_that_are_missing_stay_missing(tmp_path):
    circuit = random_circuit(scored=True)
    circuit.scores[circuit.kept.nonzero()[0, 0]] = math.nan  # of kept and cut edges alike
    found = Circuit.load(saved(tmp_path, circuit))
    assert_same(found, circuit)
    assert json.loads((tmp_path / "circuit.json").read_text(), parse_constant=pytest.fail)["edges"]


def test_the_file_names_kept_edges_for_a_person_to_read(tmp_path):
    circuit = random_circuit(scored=True, provenance=PROVENANCE)
    text = saved(tmp_path, circuit).read_text(encoding="utf-8")
    data = json.loads(text)
    assert {edge["edge"] for edge in data["edges"]} == names(circuit)
    assert sum("->" in line for line in text.splitlines()) == circuit.n_edges  # one a line
    assert data["graph"] == {"n_layers": 2, "n_heads": 3, "parallel": False} and data["provenance"] == PROVENANCE
    assert "日本" in text


@pytest.mark.parametrize("name", ["circuit.json", "circuit", "eap.0.01", "eap.0.02.json"])
def test_circuits_side_by_side_keep_their_own_scores(tmp_path, name):
    ours, other = random_circuit(seed=1, scored=True), random_circuit(seed=2, scored=True)
    path = saved(tmp_path, ours, name)
    saved(tmp_path, other, "eap.0.5")
    saved(tmp_path, other, "other.json")
    assert_same(Circuit.load(path), ours)


def test_saving_a_circuit_without_scores_over_a_scored_one_leaves_no_old_scores(tmp_path):
    scored = random_circuit(scored=True)
    saved(tmp_path, scored)
    plain = Circuit(GRAPH, scored.kept)
    assert_same(Circuit.load(saved(tmp_path, plain)), plain)


@pytest.mark.parametrize("same_edges", [True, False])
@pytest.mark.parametrize("survived", [0, 1])
def test_a_crash_in_the_middle_of_saving_leaves_the_old_circuit(tmp_path, monkeypatch, survived, same_edges):
    """The process dies at the first or the second file that is put in place."""
    old = random_circuit(seed=1, scored=True, provenance={"method": "old"})
    new = random_circuit(seed=2, scored=True, provenance={"method": "new"})
    if same_edges:
        new = Circuit(GRAPH, old.kept, new.scores, {"method": "new"})
    path = saved(tmp_path, old)
    replace, count = os.replace, []

    def dies(*names):
        if len(count) == survived:
            raise KeyboardInterrupt
        count.append(names)
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            new.save(path)
    assert_same(Circuit.load(path), old)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))
    new.save(path)
    assert_same(Circuit.load(path), new)


def test_without_the_file_of_scores_the_kept_edges_keep_theirs(tmp_path):
    circuit = random_circuit(scored=True)
    path = saved(tmp_path, circuit)
    scores_file(tmp_path).unlink()
    found = Circuit.load(path)
    assert found.kept.equal(circuit.kept)
    assert same_scores(found.scores, circuit.scores.masked_fill(~circuit.kept, math.nan))


def test_a_file_of_scores_of_another_circuit_is_refused(tmp_path):
    circuit = random_circuit(seed=1, scored=True)
    path = saved(tmp_path, circuit)
    (tmp_path / "other").mkdir()
    saved(tmp_path / "other", random_circuit(seed=2, scored=True))
    scores_file(tmp_path).write_bytes(scores_file(tmp_path / "other").read_bytes())
    with pytest.raises(CircuitError, match="digest differs"):
        Circuit.load(path)


def refused(path, *words):
    with pytest.raises(CircuitError) as caught:
        Circuit.load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    refused(tmp_path / "nowhere.json", "cannot be read")
    refused(tmp_path)


def test_every_beginning_of_a_file_is_refused(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        refused(path, "is not a circuit")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"format": "kcwb-circuit/99"}',
        '{"cfg": {"n_layers": 2}, "nodes": {}, "edges": {"input->m0": {"score": 1.0, "in_graph": true}}}',
        b"\xff\xfe{",
        "[" * 100_000,
    ],
    ids=["list", "null", "empty object", "a later format", "MIB", "not UTF-8", "nested without end"],
)
def test_a_foreign_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "circuit.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(path, "is not a circuit")


EDITS = {
    "an edge more": lambda data: data["edges"].append({"edge": "input->logits<q>", "score": None}),
    "an edge less": lambda data: data["edges"].pop(),
    "an edge renamed": lambda data: data["edges"][0].update(edge="m1->logits!"),
    "an edge without name": lambda data: data["edges"][0].pop("edge"),
    "an edge without score": lambda data: data["edges"][0].pop("score"),
    "an edge that is a number": lambda data: data["edges"][0].update(edge=5),
    "an edge that is a list": lambda data: data["edges"][0].update(edge=["input", "m0"]),
    "an edge that is a text": lambda data: data["edges"].__setitem__(0, "input->m0"),
    "an edge twice": lambda data: data["edges"].append({**data["edges"][0], "score": 9.0}),
    "a score that is a text": lambda data: data["edges"][0].update(score="high"),
    "a score that is a list": lambda data: data["edges"][0].update(score=[1.0]),
    "no edges": lambda data: data.pop("edges"),
    "edges that are null": lambda data: data.update(edges=None),
    "no digest": lambda data: data.pop("digest"),
    "another digest": lambda data: data.update(digest="0" * 64),
    "no graph": lambda data: data.pop("graph"),
    "a graph with fewer layers": lambda data: data["graph"].update(n_layers=1),
    "a graph with fewer heads": lambda data: data["graph"].update(n_heads=1),
    "a graph of text": lambda data: data["graph"].update(n_layers="2"),
    "a graph of null": lambda data: data["graph"].update(n_heads=None),
    "a graph with more keys": lambda data: data["graph"].update(n_experts=8),
    "a graph of negative size": lambda data: data["graph"].update(n_layers=-2),
    "a graph of broken size": lambda data: data["graph"].update(n_layers=2.5),
    "no provenance": lambda data: data.pop("provenance"),
    "a provenance that is a text": lambda data: data.update(provenance="eap"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS.keys())
def test_an_edited_file_is_refused_by_name(tmp_path, change):
    # one edge into each part of the graph, so that no smaller graph has them all
    circuit = Circuit.from_edges(GRAPH, {"input->a1.h2<v>": 1.0, "a1.h2->m1": 0.5, "m1->logits": math.nan})
    refused(edited(saved(tmp_path, circuit), change))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_damaged_file_of_scores_is_refused_by_name(tmp_path, length):
    path = saved(tmp_path)
    scores = scores_file(tmp_path)
    scores.write_bytes(scores.read_bytes()[:length])
    with pytest.raises(CircuitError, match="damaged") as caught:
        Circuit.load(path)
    assert str(scores) in str(caught.value)


def test_a_file_of_scores_of_another_shape_is_refused_by_name(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = saved(tmp_path)
    scores = scores_file(tmp_path)
    with safe_open(scores, "pt") as file:
        metadata = file.metadata()
    save_file({"scores": torch.zeros(2, 2)}, scores, metadata=metadata)
    with pytest.raises(CircuitError) as caught:
        Circuit.load(path)
    assert str(tmp_path) in str(caught.value)


def test_a_provenance_that_is_not_json_is_an_error_before_anything_is_written(tmp_path):
    path = saved(tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        random_circuit(seed=5, scored=True, provenance={"device": torch.device("cpu")}).save(path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_to_is_refused_by_name(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    with pytest.raises(CircuitError, match=r"cannot be saved as .*file.circuit\.json"):
        random_circuit(scored=True).save(blocked / "circuit.json")
    assert blocked.read_text() == "kept"


def test_the_digest_is_of_the_edges_alone():
    a = random_circuit(scored=True, provenance={"method": "x"})
    assert a.digest == Circuit(GRAPH, a.kept).digest
    digests = {random_circuit(seed=seed).digest for seed in range(10)}
    assert len(digests) == 10
