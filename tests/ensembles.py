"""Ensembles made of circuits, for what weighs by inclusion probabilities."""

from __future__ import annotations

import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble


def drawn(*circuits: Circuit) -> Ensemble:
    """These circuits as draws, with the first one's provenance."""
    kept = torch.stack([one.kept for one in circuits])
    places = kept.any(0).nonzero()
    scores = torch.ones(len(places))
    return Ensemble(circuits[0].graph, places, kept[:, *places.T], {}, scores, circuits[0].provenance)


def certain(circuit: Circuit) -> Ensemble:
    """An ensemble whose draws are all one circuit."""
    return drawn(circuit, circuit, circuit)
