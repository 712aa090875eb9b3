"""Inclusion probabilities, their split by source, consensus and bound: counted by hand, and enumerated exactly."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, weighted_iou
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph
from kcwb.statistics import proportion_interval

GRAPH = Graph(1, 2)
THROUGH = ["input->a0.h0<v>", "a0.h0->logits"]
OTHER = ["input->a0.h1<v>", "a0.h1->logits"]


def ensemble_of(*draws: list[str], twins: dict[str, list[list[str]]] | None = None, **more) -> Ensemble:
    """An ensemble of named edges, in the order of the graph."""
    every = [*draws, *(one for some in (twins or {}).values() for one in some)]
    places = sorted({GRAPH.edge_index(name) for one in every for name in one})

    def masks(some: list[list[str]]) -> torch.Tensor:
        return torch.tensor([[place in map(GRAPH.edge_index, one) for place in places] for one in some])

    return Ensemble(
        GRAPH, torch.tensor(places).reshape(-1, 2), masks([*draws]),
        {name: masks(some) for name, some in (twins or {}).items()}, torch.arange(len(places)) + 1.0, **more,
    )  # fmt: skip


FOUR = ensemble_of(
    [*THROUGH, *OTHER], THROUGH, THROUGH, ["input->logits", *THROUGH],
    twins={"facts": [THROUGH, ["input->logits"]], "order": [[*THROUGH, *OTHER], THROUGH]},
)  # fmt: skip


def test_pi_is_the_share_of_draws_with_its_interval():
    edges = FOUR.edges.set_index(["sender", "receiver"])
    expected = {
        ("input", "a0.h0<v>"): 4, ("a0.h0", "logits"): 4,
        ("input", "a0.h1<v>"): 1, ("a0.h1", "logits"): 1, ("input", "logits"): 1,
    }  # fmt: skip
    assert edges["draws"].to_dict() == expected
    assert edges["pi"].to_dict() == {edge: n / 4 for edge, n in expected.items()}
    for edge, n in expected.items():
        assert (edges.loc[edge, "low"], edges.loc[edge, "high"]) == proportion_interval([1] * n + [0] * (4 - n))
    assert FOUR.edges["pi"].is_monotonic_decreasing
    matrix = FOUR.inclusion
    assert matrix.sum() == pytest.approx(2.75) and matrix[GRAPH.edge_index("input->logits")] == 0.25


def test_twins_tell_which_source_removes_an_edge():
    edges = FOUR.edges.set_index(["sender", "receiver"])
    # other facts: the first draw loses its second head, the second one its first head; the order changes nothing
    assert edges["facts"].round(6).to_dict() == pytest.approx(
        {("input", "a0.h0<v>"): 0.5, ("a0.h0", "logits"): 0.5, ("input", "a0.h1<v>"): 1, ("a0.h1", "logits"): 1,
         ("input", "logits"): math.nan},
        nan_ok=True,
    )  # fmt: skip
    assert set(edges["order"].dropna()) == {0.0}


def test_a_node_is_in_a_draw_that_keeps_one_of_its_edges():
    nodes = FOUR.nodes.set_index("node")["pi"].to_dict()
    assert nodes == {"input": 1.0, "logits": 1.0, "a0.h0": 1.0, "a0.h1": 0.25}


def test_the_sources_are_distances_between_circuits():
    table = FOUR.sources.set_index("source")
    # facts: the twins differ by 2 edges and by 3; the draws 0 and 1 by 2, the draws 1 and 2 by none
    assert table["edges"].to_dict() == pytest.approx({"facts": 2.5, "order": 0, "everything": 9 / 6})
    assert table.loc["facts", "iou"] == pytest.approx((2 / 4 + 0) / 2)
    assert table.loc["facts", "total"] == pytest.approx(2.5 / 1) and table.loc["order", "total"] == 0
    assert table.loc["facts", "alone"] == pytest.approx(1 - (0 + 3) / 2 / 1)
    pairs = [2 / 4, 2 / 4, 2 / 5, 1, 2 / 3, 2 / 3]
    assert table.loc["everything", "iou"] == pytest.approx(np.mean(pairs))
    assert math.isnan(table.loc["everything", "total"])


def test_the_indices_are_those_of_the_analysis_of_variance():
    """Against every combination of three sources with 3, 2 and 4 values, which edges depend on alone and together."""
    sizes = {"facts": 3, "setting": 2, "order": 4}
    rng = np.random.default_rng(0)
    edges = GRAPH.exists.nonzero()

    def circuit(facts: int, setting: int, order: int) -> np.ndarray:
        alone, both, three = facts == 1, setting == 1 and order > 1, (facts + setting + order) % 2 == 0
        return np.resize([alone, alone, both, three, setting == 0], len(edges)).astype(bool)

    table = {levels: circuit(*levels).astype(float) for levels in product(*map(range, sizes.values()))}
    whole = np.array([*table.values()]).reshape(*sizes.values(), -1)
    variance = whole.var((0, 1, 2)).sum()
    exact = {}
    for axis, name in enumerate(sizes):
        others = tuple(i for i in range(3) if i != axis)
        exact[name] = (whole.mean(others).var(0).sum() / variance, whole.var(axis).mean((0, 1)).sum() / variance)
    draws = 2000
    levels = {name: rng.integers(size, size=draws) for name, size in sizes.items()}

    def masks(levels: dict[str, np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(whole[tuple(levels.values())] > 0)

    twins = {name: masks(levels | {name: np.roll(levels[name], -1)}) for name in sizes}
    found = Ensemble(GRAPH, edges, masks(levels), twins, torch.zeros(len(edges))).sources.set_index("source")
    for name, (alone, total) in exact.items():
        assert found.loc[name, "alone"] == pytest.approx(alone, abs=0.03)
        assert found.loc[name, "total"] == pytest.approx(total, abs=0.03)
        assert found.loc[name, "alone_low"] < alone < found.loc[name, "alone_high"]
    assert found.loc["everything", "edges"] == pytest.approx(2 * variance, rel=0.03)


def test_the_consensus_keeps_what_is_sure_and_leads_somewhere():
    half = ensemble_of([*THROUGH, "input->a0.h1<v>"], [*THROUGH, "input->a0.h1<v>"], OTHER, ["input->logits"])
    names = {c: set(half.consensus(c).edges["sender"] + "->" + half.consensus(c).edges["receiver"]) for c in (0.2, 0.5)}
    assert names[0.2] == {*THROUGH, *OTHER, "input->logits"}
    assert names[0.5] == {*THROUGH}  # the edge into a0.h1 is in three of four draws, and ends there
    assert half.consensus(1.0).n_edges == 0
    assert half.consensus(0.5).provenance["consensus"] == {"confidence": 0.5, "draws": 4}
    with pytest.raises(SettingError, match="confidence=0 is not a number above 0"):
        half.consensus(0)


def test_the_bound_is_that_of_stability_selection():
    table = FOUR.bound((0.4, 0.5, 0.75, 1.0), null=ensemble_of(["input->logits"], ["input->logits"])).set_index(
        "confidence"
    )
    q, p = (4 + 2 + 2 + 3) / 4, GRAPH.n_edges
    assert table["edges"].to_dict() == {0.4: 2, 0.5: 2, 0.75: 2, 1.0: 2}
    assert table["bound"].to_dict() == pytest.approx({0.4: math.inf, 0.5: math.inf, 0.75: 2 * q**2 / p, 1.0: q**2 / p})
    assert (table["null"] == 1).all()
    assert FOUR.bound()["null"].isna().all()


def test_the_bound_counts_the_edges_that_were_searched():
    within = ensemble_of(THROUGH, THROUGH, provenance={"parameters": {"within": {"edges": 7}}})
    assert within.bound([1.0])["bound"][0] == pytest.approx(2**2 / 7)


def test_overlaps_weigh_by_pi():
    one, two = Circuit.from_edges(GRAPH, THROUGH), Circuit.from_edges(GRAPH, [*THROUGH, "input->logits"])
    assert weighted_iou(one, two) == one.iou(two)
    assert weighted_iou(FOUR, FOUR) == 1
    assert weighted_iou(FOUR, one) == pytest.approx(2 / 2.75)
    assert weighted_iou(ensemble_of(THROUGH, THROUGH), two) == one.iou(two)
    assert weighted_iou(Circuit.empty(GRAPH), Circuit.empty(GRAPH)) == 1
    with pytest.raises(CircuitError, match="different graphs"):
        weighted_iou(FOUR, Circuit.empty(Graph(2, 2)))


def test_a_file_brings_everything_back(tmp_path):
    scores = FOUR.scores.clone()
    scores[1] = torch.nan
    saved = ensemble_of(
        [*THROUGH, *OTHER], THROUGH, THROUGH, THROUGH, ["input->logits"], twins={"facts": [THROUGH, OTHER]},
        provenance={"method": "eap", "relation": {"name": "größte \"Stadt\""}}, halves=(FOUR, FOUR),
    )  # fmt: skip
    saved = Ensemble(saved.graph, saved.places, saved.kept, saved.twins, scores, saved.provenance, saved.halves)
    saved.save(tmp_path / "new" / "e.json")
    found = Ensemble.load(tmp_path / "new" / "e.json")
    for name in ("places", "kept"):
        assert torch.equal(getattr(found, name), getattr(saved, name))
    assert torch.equal(found.scores.nan_to_num(9), scores.nan_to_num(9))
    assert found.twins.keys() == {"facts"} and torch.equal(found.twins["facts"], saved.twins["facts"])
    assert found.provenance == saved.provenance and found.graph == GRAPH and repr(found) == repr(saved)
    for half in found.halves:
        assert half.edges.equals(FOUR.edges) and half.sources.equals(FOUR.sources)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(CircuitError, match="at least 2 draws"):
        Ensemble(GRAPH, FOUR.places, FOUR.kept[:1], {}, FOUR.scores)
    with pytest.raises(CircuitError, match="kept of shape"):
        Ensemble(GRAPH, FOUR.places, FOUR.kept[:, :2], {}, FOUR.scores)
    with pytest.raises(CircuitError, match="not all of"):
        Ensemble(GRAPH, FOUR.places + 50, FOUR.kept, {}, FOUR.scores)
    with pytest.raises(CircuitError, match="null is of"):
        graph = Graph(2, 2)
        stranger = Ensemble(graph, graph.exists.nonzero()[:1], torch.ones(2, 1, dtype=torch.bool), {}, torch.zeros(1))
        FOUR.bound(null=stranger)
