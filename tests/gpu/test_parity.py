"""The same numbers on another device: logits, masked runs, scores, searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover, score_edges
from kcwb.models.loading import Model, load_model
from kcwb.tasks.task import Task, make_task
from tests.tiny import tiny_hf, tokenizer, word_relation

FAMILIES = ["gpt2", "llama", "qwen3", "neox", "gemma2", "opt"]


@pytest.fixture(params=FAMILIES)
def pair(request, device: str) -> list[tuple[Model, Task]]:
    """A model and a task of it, on the CPU and on the device; all facts are in the task, known or not."""
    found = []
    for place in ("cpu", device):
        model = load_model(tiny_hf(request.param), tokenizer(), device=place)
        found.append((model, make_task(model, word_relation(), n=4, n_test=8)))
    return found


def test_runs_of_circuits(pair) -> None:
    (here, task), (there, other) = pair
    assert [fact.subject for fact in task.val.facts] == [fact.subject for fact in other.val.facts]
    for ablation in ("zero", "mean"):
        for kept in (None, random_circuit(here.graph, 20, 0).kept, random_circuit(here.graph, 20, 0).complement().kept):
            ours = run_circuit(here, kept, task.val, make_ablation(here, task, ablation))
            theirs = run_circuit(there, kept, other.val, make_ablation(there, other, ablation))
            assert theirs.device.type == there.device.type
            torch.testing.assert_close(theirs.cpu(), ours, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "ceap", "gim", "relp"])
def test_scores(pair, method: str) -> None:
    (here, task), (there, other) = pair
    ours, theirs = (score_edges(m, t, method, progress=False) for m, t in ((here, task), (there, other)))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(("method", "settings"), [("acdc", {"tau": 0.003}), ("ig-prune", {"edges": 20})])
def test_searches(pair, method: str, settings: dict[str, Any]) -> None:
    """Rounding may decide a near tie otherwise, and what follows it; most edges are the same."""
    (here, task), (there, other) = pair
    settings = {**settings, "progress": False, **({"checkpoint": False} if method == "acdc" else {})}
    ours, theirs = (discover(m, t, method, **settings).kept for m, t in ((here, task), (there, other)))
    assert ours.any() and int((ours & theirs).sum()) >= 0.7 * int((ours | theirs).sum())


def test_gates_can_be_learned_there(pair) -> None:
    _, (there, task) = pair
    found = discover(there, task, "edge-pruning", edges=20, updates=10, progress=False)
    assert 0 < found.n_edges <= 24
