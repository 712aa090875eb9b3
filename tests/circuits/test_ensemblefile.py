"""An ensemble's file: whole or refused in one line, whatever stands in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.ensemblefile import _digest
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from tests.ensembles import certain, drawn
from tests.full_disk import full_disk

GRAPH = Graph(2, 2)
FIVE = drawn(*(random_circuit(GRAPH, 8, seed) for seed in range(5)))


def edges(data: dict[str, Any]) -> list[dict[str, Any]]:
    return data["parts"][0]["edges"]


def tampered(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A file whose digest is right, and something else is not."""
    path = folder / "ensemble.json"
    FIVE.save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    data["digest"] = _digest(data["graph"], data["parts"])
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "kept", ["-1", "+1", " 1", "1_", "0x", "fg", "\uff11\uff11", "FF", "", "000", None, 5, ["a", "b"]]
)
def test_draws_that_are_no_hexadecimal_number_are_refused(tmp_path, kept):
    path = tampered(tmp_path, lambda data: edges(data)[0].update(kept=kept))
    with pytest.raises(CircuitError, match="is damaged"):
        Ensemble.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: edges(data).append(dict(edges(data)[0])),
        lambda data: edges(data)[0].update(edge="a1.h0->a0.h0<q>"),
        lambda data: edges(data)[0].update(edge=5),
        lambda data: edges(data)[0].update(score="much"),
        lambda data: edges(data)[0].update(score=10**400),
        lambda data: edges(data)[0].pop("score"),
        lambda data: data["parts"][0].update(draws=10**9),
        lambda data: data["parts"][0].update(draws=True),
        lambda data: data["parts"][0].update(draws=4, edges=[]),
        lambda data: data["parts"][0].update(twins={"kept": 5}),
        lambda data: data["parts"][0].update(twins={"facts": -1}),
        lambda data: data["parts"][0].update(twins=[]),
        lambda data: data["parts"].append(data["parts"][0]),
        lambda data: data.update(parts=[]),
        lambda data: data.update(graph={"n_layers": 10**6, "n_heads": 10**6, "parallel": False}),
        lambda data: data.update(provenance=5),
    ],
)
def test_a_file_that_lies_under_a_right_digest_is_refused(tmp_path, change):
    path = tampered(tmp_path, change)
    if 'edges": []' in path.read_text(encoding="utf-8"):
        assert not Ensemble.load(path).size  # four draws that kept nothing are an ensemble
        return
    with pytest.raises(CircuitError, match=r"ensemble\.json is damaged"):
        Ensemble.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[1", b"null", b'{"format": "kcwb-ensemble/2"}', b"[" * 10**5, b'{"format": 1' + b"0" * 5000],
)
def test_what_is_no_ensemble_is_refused(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(CircuitError, match=r"some\.json is not an ensemble"):
        Ensemble.load(path)


def test_whatever_its_provenance_says_an_ensemble_can_be_read_and_shown(tmp_path):
    said = {
        "facts": 5,
        "halves": 3,
        "ablation": 7,
        "parameters": 3,
        "relation": 5,
        "model": 5,
        "format": "x",
        "parts": 1,
    }
    path = tmp_path / "ensemble.json"
    replace(FIVE, provenance=said).save(path)
    found = Ensemble.load(path)
    assert found.provenance == said and repr(found).startswith("Ensemble(5 draws")
    assert found.searched == GRAPH.n_edges and found.consensus(0.2).provenance["consensus"]["draws"] == 5


def test_an_ensemble_that_kept_nothing_is_one(tmp_path):
    nothing = certain(Circuit.empty(GRAPH))
    nothing.save(tmp_path / "nothing.json")
    found = replace(Ensemble.load(tmp_path / "nothing.json"), twins={"facts": nothing.kept})
    assert found.edges.empty and found.nodes.empty and found.size == 0 and not found.inclusion.any()
    assert found.sources["edges"].tolist() == [0, 0] and found.consensus(0.5).n_edges == 0
    assert (found.bound()["edges"] == 0).all()


def test_what_cannot_be_told_apart_in_tables_and_files_is_no_ensemble():
    for wrong, words in [
        ({"twins": {"kept": FIVE.kept}}, "cannot be called 'kept'"),
        ({"twins": {"draws": FIVE.kept}}, "cannot be called 'draws'"),
        ({"twins": {"facts": FIVE.kept[:0]}}, "no more twins than draws"),
        ({"kept": FIVE.kept.float()}, "boolean"),
        ({"places": FIVE.places.float()}, "whole numbers"),
        ({"places": FIVE.places[[0] * len(FIVE.places)]}, "an edge twice"),
        ({"halves": (FIVE,)}, "two halves"),
        ({"halves": (FIVE, certain(Circuit.empty(Graph(1, 1))))}, "of its own graph"),
    ]:
        with pytest.raises(CircuitError, match=words):
            replace(FIVE, **wrong)


def test_a_full_disk_leaves_the_old_ensemble(tmp_path):
    path = tmp_path / "ensemble.json"
    FIVE.save(path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(CircuitError, match="cannot be saved"):
        certain(random_circuit(GRAPH, 20, 3)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_circuits_and_ensembles_do_not_overwrite_each_other(tmp_path):
    circuit = random_circuit(GRAPH, 5, seed=0)
    circuit.save(tmp_path / "circuit.json")
    FIVE.save(tmp_path / "ensemble.json")
    with pytest.raises(CircuitError, match="is no ensemble, so it is left"):
        FIVE.save(tmp_path / "circuit.json")
    with pytest.raises(CircuitError, match="is no circuit, so it is left"):
        circuit.save(tmp_path / "ensemble.json")
    with pytest.raises(CircuitError, match="is not an ensemble of this workbench"):
        Ensemble.load(tmp_path / "circuit.json")
    assert torch.equal(Ensemble.load(tmp_path / "ensemble.json").kept, FIVE.kept)
