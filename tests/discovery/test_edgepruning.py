"""Learned gates: the distribution of a gate, the planted circuit found again, seeds, and how many edges."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.methods import edgepruning as module
from kcwb.discovery.methods.edgepruning import chance_open, edge_pruning, hard_concrete
from kcwb.errors import SettingError
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tasks import known_relation


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 2.0])
def test_a_gate_is_open_as_often_as_said(log_alpha: float) -> None:
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    gates = hard_concrete(torch.full((40_000,), log_alpha), u)
    assert gates.min() >= 0 and gates.max() <= 1 and (gates == 0).any() and (gates == 1).any()
    chance = float(chance_open(torch.tensor(log_alpha)))
    assert stats.binomtest(int((gates > 0).sum()), 40_000, chance).pvalue > 1e-3
    # The same chance, from the distribution function of the variable before it is clamped.
    inner = stats.logistic(loc=log_alpha * 1.5, scale=1.5)
    assert float((gates == 1).float().mean()) == pytest.approx(inner.sf(torch.tensor(11.0).log()), abs=0.01)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_beats_random_circuits_of_its_size(tiny, architecture: str) -> None:
    model = tiny(architecture)
    task = make_task(model, known_relation(model, 12), n=4)
    loss, cuts = make_loss(model, task.val), make_ablation(model, task, "mean")
    found = discover(model, task, "edge-pruning", edges=20, updates=60, progress=False)
    assert 0 < found.n_edges <= 24
    reached = float(loss(run_circuit(model, found, task.val, cuts)))
    assert found.provenance["loss"] == pytest.approx(reached, rel=1e-4)
    drawn = [
        float(loss(run_circuit(model, random_circuit(model.graph, found.n_edges, seed), task.val, cuts)))
        for seed in range(20)
    ]
    assert reached < min(drawn)


def test_seeds_decide_and_other_edges_have_no_score(tiny) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 9), n=3)
    loss, cuts = make_loss(model, task.val), make_ablation(model, task, "mean")
    how = {"edges": 15, "start": 60, "updates": 5}
    one, same, other = (edge_pruning(model, loss, cuts, seed=seed, **how) for seed in (0, 0, 1))
    assert torch.equal(one.scores.nan_to_num(), same.scores.nan_to_num()) and torch.equal(one.kept, same.kept)
    assert not torch.equal(one.scores.nan_to_num(), other.scores.nan_to_num())
    assert int((~one.scores.isnan()).sum()) <= 60 and not one.scores[one.kept].isnan().any()


def test_open_gates_come_down_to_the_edges_asked_for(tiny) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 9), n=3)
    found = discover(model, task, "edge-pruning", edges=15, updates=300, progress=False)
    assert found.provenance["open"] == pytest.approx(15, abs=6)


def test_it_can_be_cancelled(tiny) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 9), n=3)

    def stop(done, total, note):
        if "loss" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover(model, task, "edge-pruning", progress=stop)


def test_a_start_that_holds_no_path_is_refused(tiny, monkeypatch) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 9), n=3)
    first = torch.zeros(model.graph.exists.shape)
    first[model.graph.edge_index("input->m0")] = 1.0  # whose output nothing reads
    monkeypatch.setattr(module, "attribution_scores", lambda *_, **__: first)
    with pytest.raises(SettingError, match="start=1"):
        discover(model, task, "edge-pruning", edges=1, start=1, progress=False)
