"""A circuit is read from any kind of file that is known, whatever the file's name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

import kcwb
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.files import file_kind, read_any
from kcwb.circuits.interchange import save_mib
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from tests.workbench.ensembles import KEPT, ensemble_of

GRAPH = Graph(2, 2)
EDGES = ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"]
DRAWN = 'digraph "" {\n  embed -> "<a0.1_v>";\n  "<a0.1>" -> "<m1>";\n  "<m1>" -> "<resid_post>";\n}\n'


def write(kind: str, path) -> None:
    circuit = Circuit.from_edges(GRAPH, EDGES, provenance={"method": "hand"})
    if kind == "gv":
        path.write_text(DRAWN)
    elif kind == "ensemble":
        ensemble_of(KEPT).save(path)
    elif kind == "mib":
        save_mib(circuit, path)
    else:
        circuit.save(path)


@pytest.mark.parametrize("name", ["x.json", "x.gv", "x"])
@pytest.mark.parametrize("kind", ["circuit", "ensemble", "mib", "gv"])
def test_the_content_says_what_it_is_and_the_name_does_not_matter(tmp_path, kind: str, name: str) -> None:
    path = tmp_path / name
    write(kind, path)
    assert file_kind(path) == kind
    found = read_any(path, GRAPH)
    if isinstance(found, Ensemble):
        assert kind == "ensemble" and torch.equal(found.kept, ensemble_of(KEPT).kept)
    else:
        assert sorted(found.edges["sender"] + "->" + found.edges["receiver"]) == sorted(EDGES)
    if kind != "gv":  # which does not say of which graph it is
        assert read_any(str(path)).graph == GRAPH


def test_a_drawing_needs_the_models_graph(tmp_path) -> None:
    write("gv", tmp_path / "x.gv")
    with pytest.raises(CircuitError, match="does not say its model's size"):
        read_any(tmp_path / "x.gv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a circuit or an ensemble of kcwb, MIB's JSON, or a graphviz file"),
        (b"# notes\n", "is not a circuit"),
        (b"\xff\xfe", "is not a circuit"),
        (b"[" * 100_000, "is not a circuit"),
        (b"[1]", "neither their 'format' nor MIB's 'cfg'"),
        (b'{"format": "kcwb-world/1"}', "neither"),
        (b'{"format": 3}', "neither"),
        (b'{"format": "kcwb-circuit/9"}', "its format is not"),
        (b'{"cfg": {}}', "cfg"),
        (b"digraph {", "is not a whole graphviz file"),
        (b"PK\x03\x04", "can run code"),
        (pickle.dumps({"cfg": 1}), "can run code"),
        (json.dumps({"format": "kcwb-ensemble/1"}).encode(), "damaged"),
    ],
)
def test_what_is_none_of_them_is_refused_in_words(tmp_path, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CircuitError, match=words) as refusal:
        read_any(path, GRAPH)
    assert str(path) in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(CircuitError, match="cannot be read"):
            read_any(path)


def test_it_is_public() -> None:
    assert kcwb.circuits.read_any is read_any
