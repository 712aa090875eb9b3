"""Ensembles made by hand, to be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kcwb.circuits.ensemble import Ensemble
from kcwb.models.graph import Graph


def ensemble_of(
    kept: Mapping[str, str],
    twins: Mapping[str, Mapping[str, str]] | None = None,
    graph: Graph | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Ensemble:
    """Edge -> which draws keep it, as "1101"; of each source the same for its twins. Scores fall from edge to edge."""
    graph = graph or Graph(n_layers=2, n_heads=2)
    order = sorted(kept, key=graph.edge_index)

    def bits(rows: Mapping[str, str]) -> torch.Tensor:
        return torch.tensor([[one == "1" for one in rows[name]] for name in order]).T.contiguous()

    places = torch.tensor([graph.edge_index(name) for name in order])
    scores = torch.tensor([1 / (1 + list(kept).index(name)) for name in order])
    return Ensemble(
        graph, places, bits(kept), {name: bits(rows) for name, rows in (twins or {}).items()}, scores, provenance or {}
    )


KEPT = {
    "input->a0.h1<v>": "1111",
    "a0.h1->a1.h0<q>": "1110",
    "a1.h0->logits": "1111",
    "input->m1": "0100",
    "m1->logits": "0100",
}
TWINS = {
    "facts": {**KEPT, "a0.h1->a1.h0<q>": "1011", "input->m1": "0000", "m1->logits": "0000"},
    "setting": {**KEPT, "a0.h1->a1.h0<q>": "0011"},
}
"""Four draws in which three edges are sure or nearly so, and a path by way of m1 is kept once."""
