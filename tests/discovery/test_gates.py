"""Gates on edges: soft runs, their gradients by finite differences, what integrated gradients sum to, and pruning."""

from __future__ import annotations

import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.masked import SoftRuns
from kcwb.circuits.run import run_circuit
from kcwb.discovery import gates as module
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.discover import discover
from kcwb.discovery.gates import GatedLoss
from kcwb.discovery.many import discover_many
from kcwb.discovery.methods.gates import ig_prune
from kcwb.models import rules
from kcwb.models.forward import forward
from kcwb.tasks.metrics import at_answers, make_loss
from kcwb.tasks.task import make_task
from tests.tasks import known_relation

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "qwen3"]


@pytest.fixture(params=FAMILIES)
def model(request, tiny):
    return tiny(request.param)


def some_edges(graph, share, seed=0):
    return (torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(seed)) < share) & graph.exists


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_gates_of_one_are_the_circuit(model, ablation):
    task = make_task(model, known_relation(model, 9), n=4)
    cuts = make_ablation(model, task, ablation)
    prompts = cuts.usable(task.val)
    runs = SoftRuns(model.network, prompts, cuts.values(prompts))
    for share in (0.03, 0.3, 1.0):
        kept = some_edges(model.graph, share)
        found = runs.gated(kept.nonzero(), torch.ones(int(kept.sum())), kept)
        expected = run_circuit(model, kept, prompts, cuts)
        torch.testing.assert_close(found[prompts.answer_mask], expected[prompts.answer_mask], atol=1e-4, rtol=1e-4)
        off = runs.gated(kept.nonzero(), torch.zeros(int(kept.sum())), kept)
        none = run_circuit(model, torch.zeros_like(kept), prompts, cuts)
        torch.testing.assert_close(off[prompts.answer_mask], none[prompts.answer_mask], atol=1e-4, rtol=1e-4)


def test_a_gate_between_delivers_a_mixture(model):
    """One gate alone, by the pass that computes everything with that mixture on the cut edge."""
    task = make_task(model, known_relation(model, 9), n=3)
    tokens, graph = task.val.tokens, model.graph
    cuts = make_ablation(model, task, "mean")
    runs = SoftRuns(model.network, task.val, cuts.values(task.val))
    clean, ablated = forward(model.network, tokens, senders=True).senders, cuts.values(task.val)
    edges = graph.exists.nonzero()
    for i in range(0, len(edges), max(1, len(edges) // 9)):
        gates = torch.ones(len(edges))
        gates[i] = 0.3
        kept, row = graph.exists.clone(), int(edges[i, 0])
        kept[*edges[i]] = False
        mixed = ablated.clone()
        mixed[row] = 0.3 * clean[row] + 0.7 * ablated[row]
        residual = forward(model.network, tokens, kept=kept, ablated=mixed).residual
        expected = model.network.logits(at_answers(residual, task.val))
        found = runs.gated(edges, gates, graph.exists)
        mask = task.val.answer_mask
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_gradients_are_finite_differences_and_chunks_change_nothing(model, monkeypatch):
    task = make_task(model, known_relation(model, 9), n=4)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    gated, kept = GatedLoss(model, loss, cuts), some_edges(model.graph, 0.5)
    edges = kept.nonzero()
    at = torch.rand(len(edges), generator=torch.Generator().manual_seed(3))
    value, gradient = gated(edges, at, kept)
    strong = gradient.abs().topk(5).indices
    for i in [*strong.tolist(), 0, len(edges) - 1]:
        step = torch.zeros(len(edges))
        step[i] = 1e-2
        slope = (gated(edges, at + step, kept)[0] - gated(edges, at - step, kept)[0]) / 2e-2
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-3, rel=1e-2)
    assert float(gradient[strong[0]].abs()) > 0.01
    monkeypatch.setattr(module, "_COPIES", 10**7)
    again = GatedLoss(model, loss, cuts)
    assert len(again._parts.run(lambda piece: piece)) == len(task.val)
    other, slopes = again(edges, at, kept)
    assert other == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(slopes, gradient, atol=1e-5, rtol=1e-4)
    assert again.of(kept) == pytest.approx(float(loss(run_circuit(model, kept, task.val, cuts))), rel=1e-5)


def test_scores_of_gates_sum_to_what_the_circuit_gains(model):
    task = make_task(model, known_relation(model, 9), n=3)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    gated, kept = GatedLoss(model, loss, cuts), some_edges(model.graph, 0.6)
    steps = 60
    _, scores = gated.integrated(kept, [(i + 0.5) / steps for i in range(steps)])
    gain = gated.of(torch.zeros_like(kept)) - gated.of(kept)
    assert abs(gain) > 0.02
    assert float(scores.sum()) == pytest.approx(gain, rel=1e-2)


def test_pruning_ranks_as_the_plain_loop_does(model):
    """The same by runs of whole circuits: each edge's slope by finite differences would be too slow, so by autograd."""
    task = make_task(model, known_relation(model, 9), n=3)
    cuts, loss, graph = make_ablation(model, task, "mean"), make_loss(model, task.val), model.graph
    places = ig_prune(model, loss, cuts, start=100, signed_below=60, rounds=4, steps=2)
    first = attribution_scores(model, loss, cuts, steps=5, rules=rules.GIM).abs()
    kept = torch.zeros_like(graph.exists)
    kept.view(-1)[first.flatten().topk(100).indices] = True
    kept = Circuit(graph, kept).without_dangling().kept
    gated, share = GatedLoss(model, loss, cuts), (30 / max(30, int(kept.sum()))) ** (1 / 4)
    assert torch.equal(places > 0, graph.exists) and len(places[graph.exists].unique()) == graph.n_edges
    others = graph.exists & ~kept  # cut at once: they rank below, by the first score
    assert places[others].argsort().equal(first[others].argsort(stable=True))
    assert not others.any() or places[others].max() < places[kept].min()
    for _ in range(4):
        edges = kept.nonzero()
        slopes = [gated(edges, torch.full((len(edges),), alpha), kept)[1] for alpha in (0.5, 1.0)]
        scores = -(slopes[0] + slopes[1]) / 2
        scores = scores if len(edges) <= 60 else scores.abs()
        stay = edges[scores.topk(min(len(edges), max(30, int(share * len(edges))))).indices]
        left = torch.zeros_like(kept)
        left[*stay.T] = True
        left = Circuit(graph, left).without_dangling().kept
        if not left.any():
            break
        kept = left
        if kept.equal(graph.exists):
            continue
        assert places[~kept].max() < places[kept].min()  # what is left now ranks above what was ever cut
    found = discover(model, task, "ig-prune", edges=int(kept.sum()), start=100, signed_below=60, rounds=4, steps=2,
                     progress=False)  # fmt: skip
    assert torch.equal(found.kept, kept)


def test_a_small_model_and_a_cancel(model):
    task = make_task(model, known_relation(model, 9), n=3)
    found = discover(model, task, "ig-prune", edges=60, progress=False)
    assert 0 < found.n_edges <= 60

    def stop(done, total, note):
        if note.endswith("edges"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover(model, task, "ig-prune", progress=stop)


def test_an_ensemble_runs_it_on_each_draw(tiny):
    """What it finds on some facts is no mean of what it finds on each."""
    model = tiny("llama")
    task = make_task(model, known_relation(model, 9), n=5)
    how = {"start": 60, "rounds": 2, "steps": 2, "edges": 25, "progress": False}
    found = discover_many(model, task, "ig-prune", draws=5, vary=("facts",), seed=3, checkpoint=False, **how)
    cuts, pi = make_ablation(model, task, "mean"), torch.zeros(model.graph.exists.shape)
    drawn = found.provenance["drawn"]["facts"]
    for counts in drawn:
        loss = make_loss(model, task.val).resampled(counts)
        scores = ig_prune(model, loss, cuts, start=60, rounds=2, steps=2)
        kept = torch.zeros_like(model.graph.exists)
        kept.view(-1)[scores.flatten().topk(25).indices] = True
        pi += Circuit(model.graph, kept & model.graph.exists).without_dangling().kept / len(drawn)
    assert len(set(map(tuple, drawn))) > 2
    torch.testing.assert_close(found.inclusion, pi)
