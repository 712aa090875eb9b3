"""The planted two-hop model, its chains and circuits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kcwb.studies.two_hop.circuits import HopCircuits, hop_circuits
from kcwb.tasks.hops import ask_hops, make_hops
from tests.tasks.test_hops import word_chains
from tests.twohop import two_hop_model


@pytest.fixture(scope="module")
def planted():
    return two_hop_model()


@pytest.fixture(scope="module")
def hops(planted):
    return some_hops(planted, 8)


@pytest.fixture(scope="module")
def found(planted, hops):
    return hop_circuits(planted.model, hops, edges=4, progress=False)


def loose(model, **more):
    """Chains of a random model, which knows none: every rank is right enough."""
    return make_hops(ask_hops(model, word_chains(), progress=False), k=1000, shortcut_k=None, **more)


def some_hops(planted, n: int):
    return make_hops(ask_hops(planted.model, planted.composition, progress=False), n=n)


def made_by_hand(hops, two_hop, hop_1, hop_2, control) -> HopCircuits:
    """Circuits with these edges, of all facts and of each of two facts."""
    graph_of = {"two-hop": two_hop, "hop 1": hop_1, "hop 2": hop_2, "control": control}
    circuits = {name: one[0] for name, one in graph_of.items()}
    circuits["integrated"] = circuits["hop 1"] | circuits["hop 2"]
    of_fact = {name: one[1:] for name, one in graph_of.items()}
    of_fact["integrated"] = [a | b for a, b in zip(of_fact["hop 1"], of_fact["hop 2"], strict=True)]
    scores = {
        name: torch.stack([torch.where(one.kept, 1.0, 0.0) for one in some[1:]]) for name, some in graph_of.items()
    }
    circuits = {name: replace(one, scores=torch.where(one.kept, 1.0, 0.0)) for name, one in circuits.items()}
    return HopCircuits(hops, circuits, of_fact, scores, {"control": hops.tasks["hop 1"]}, {"ablation": "mean"})
