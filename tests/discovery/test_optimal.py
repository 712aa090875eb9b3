"""The best connected circuit of a size: against every subset of a small graph, and better than greedy and top-n."""

from __future__ import annotations

import itertools

import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.optimal import optimal_edges
from kcwb.discovery.selection import select_edges
from kcwb.errors import SettingError
from kcwb.models.graph import Graph


@pytest.mark.parametrize("graph", [Graph(1, 1), Graph(1, 2, parallel=True), Graph(1, 2)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_best_of_all_subsets(graph: Graph, seed: int) -> None:
    edges = graph.exists.nonzero()
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    best: dict[int, float] = {}
    for size in range(1, min(8, len(edges)) + 1):
        for some in itertools.combinations(range(len(edges)), size):
            kept = torch.zeros_like(graph.exists)
            kept[*edges[list(some)].T] = True
            if Circuit(graph, kept).without_dangling().n_edges == size:
                best[size] = max(best.get(size, -9e9), float(scores[kept].sum()))
    for budget in range(1, min(8, len(edges)) + 1):
        found = optimal_edges(graph, scores.masked_fill(~graph.exists, -torch.inf), budget)
        assert found.sum() <= budget and not (found & ~graph.exists).any()
        assert Circuit(graph, found).without_dangling().n_edges == int(found.sum())
        assert float(scores[found].sum()) == pytest.approx(max(best[n] for n in best if n <= budget), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_no_worse_than_other_selections(seed: int) -> None:
    graph = Graph(6, 4)
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    for budget in (10, 40):
        sums = {}
        for select in ("optimal", "signed", "greedy"):
            kept = select_edges(graph, scores, edges=budget, select=select)
            sums[select] = float(scores[Circuit(graph, kept).without_dangling().kept].sum())
        assert sums["optimal"] > max(sums["signed"], sums["greedy"])


def test_what_cannot_be_is_refused() -> None:
    graph = Graph(2, 2)
    scores = torch.ones(graph.exists.shape)
    nowhere = graph.exists.clone()
    nowhere[:, -1] = False  # nothing may enter the logits
    with pytest.raises(SettingError, match="that make a path"):
        select_edges(graph, scores, edges=5, select="optimal", among=nowhere)
    with pytest.raises(SettingError, match="not both or neither"):
        select_edges(graph, scores, edges=5, threshold=0.1, select="optimal")


def test_only_edges_among_those_allowed_are_chosen() -> None:
    graph = Graph(3, 2)
    scores = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(0))
    among = graph.exists & (torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    for select in ("signed", "absolute", "greedy", "optimal"):
        kept = select_edges(graph, scores, edges=graph.n_edges, select=select, among=among)
        assert kept.any() and not (kept & ~among).any()
    few = select_edges(graph, scores, edges=5, among=among)
    assert int(few.sum()) == 5 and not (few & ~among).any()
