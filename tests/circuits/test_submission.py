"""What MIB's leaderboard takes: read as its code reads it, step by step, in a graph enumerated as there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kcwb.circuits import submission
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.submission import CELLS, PERCENTAGES, SIZES, Size, save_submission
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The benchmark's models, but small."""
    monkeypatch.setattr(submission, "SIZES", {"gpt2": Size(2, 3, 12), "qwen2.5": Size(3, 2, 8)})


def edges_of(n_layers: int, n_heads: int) -> set[str]:
    """The edges of EAP-IG's `Graph.from_model`, in its order of layers: heads, then the MLP, which reads them."""
    edges, before = set(), ["input"]
    for layer in range(n_layers):
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        edges |= {f"{node}->{head}<{letter}>" for node in before for head in heads for letter in "qkv"}
        before += heads
        edges |= {f"{node}->m{layer}" for node in before}
        before.append(f"m{layer}")
    return edges | {f"{node}->logits" for node in before}


def read_as_there(path: Path, size: Size) -> dict[str, tuple[float, bool]]:
    """The steps of `Graph.from_json`; an assertion where that raises."""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert all(key in data for key in ("cfg", "nodes", "edges"))
    assert {key: data["cfg"][key] for key in ("n_layers", "n_heads", "d_model")} == size._asdict()
    assert data["cfg"]["parallel_attn_mlp"] is False
    edges = edges_of(size.n_layers, size.n_heads)
    nodes = {name for edge in edges for name in (edge.split("->")[0], edge.split("->")[1].split("<")[0])}
    for name, node in data["nodes"].items():
        assert name in nodes and type(node["in_graph"]) is bool and not {"neurons", "neurons_scores"} & set(node)
    found = {}
    for name, edge in data["edges"].items():
        assert name in edges and type(edge["score"]) is float and type(edge["in_graph"]) is bool
        assert math.isfinite(edge["score"])
        found[name] = edge["score"], edge["in_graph"]
    assert set(found) == edges
    return found


def scored(graph: Graph, seed: int = 0) -> Circuit:
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    return Circuit(graph, graph.exists & (scores > 1), scores.where(graph.exists, torch.tensor(math.nan)))


def test_scores_and_nine_circuits_are_read_by_the_leaderboards_steps(tmp_path):
    one, other = scored(Graph(2, 3)), scored(Graph(3, 2), 1)
    sizes = [int(other.graph.n_edges * percentage / 100) for percentage in PERCENTAGES]
    nine = [resize(other, edges=size) if size else Circuit.empty(other.graph) for size in sizes]
    files = save_submission({"ioi_gpt2": one, "mcqa_qwen2.5": nine}, tmp_path)
    names = [f"mcqa_qwen2.5/{percentage}.json" for percentage in PERCENTAGES]
    assert files == [tmp_path / name for name in ("ioi_gpt2/importances.json", *names)]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)
    found = read_as_there(files[0], Size(2, 3, 12))
    assert one.scores is not None
    for name, (score, kept) in found.items():
        index = one.graph.edge_index(name)
        assert score == float(one.scores[index]) and kept == bool(one.kept[index])
    for path, circuit in zip(files[1:], nine, strict=True):
        assert sum(kept for _, kept in read_as_there(path, Size(3, 2, 8)).values()) == circuit.n_edges


def test_the_benchmarks_sizes_have_its_numbers_of_edges():
    assert len(edges_of(12, 12)) == Graph(12, 12).n_edges == 32491  # of its example, ioi_gpt2
    assert set(CELLS["ioi"]) == set(SIZES) and sum(map(len, CELLS.values())) == 12


@pytest.mark.parametrize(
    ("circuits", "error", "words"),
    [
        ({"ioi_gpt": scored(Graph(2, 3))}, SettingError, "'ioi_gpt' is not known.*'ioi_gpt2'"),
        ({"mcqa_gpt2": scored(Graph(2, 3))}, SettingError, "'mcqa_gpt2' is not known"),
        ({"ioi_gpt2": scored(Graph(2, 2))}, CircuitError, "has 2 layers of 3 heads"),
        ({"ioi_gpt2": Circuit.full(Graph(2, 3))}, CircuitError, "75 of 75 edges have no score"),
        ({"ioi_gpt2": [scored(Graph(2, 3))] * 2}, CircuitError, "2 circuits; give one with scores, or 9"),
        ({"ioi_gpt2": [Circuit.full(Graph(2, 3))] * 9}, CircuitError, r"at most 0\.1% of 75 edges may have 0"),
    ],
)
def test_what_the_leaderboard_would_not_take_is_refused_and_nothing_is_written(tmp_path, circuits, error, words):
    with pytest.raises(error, match=words):
        save_submission({"ioi_qwen2.5": scored(Graph(3, 2)), **circuits}, tmp_path)
    assert not list(tmp_path.iterdir())
