"""Runs of circuits that leave out what no answer feels, against the pass that computes everything."""

from __future__ import annotations

import pytest
import torch

from kcwb.circuits import masked as module
from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.masked import MaskedRuns, needs
from kcwb.circuits.plan import Need
from kcwb.discovery.baselines import random_circuit
from kcwb.models.forward import forward
from kcwb.tasks.metrics import at_answers
from kcwb.tasks.task import make_task
from tests.tasks import known_relation

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "qwen3"]


def with_share(graph, share, seed=0):
    return (torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(seed)) < share) & graph.exists


@pytest.fixture(params=FAMILIES)
def model(request, tiny):
    return tiny(request.param)


@pytest.mark.parametrize("few", [0.5, module._FEW])  # at one half, nothing is left to the other pass
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_logits_are_those_of_the_pass_that_computes_everything(model, ablation, few, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    task = make_task(model, known_relation(model, 9), n=4)
    network, graph, prompts = model.network, model.graph, task.val
    ablated = make_ablation(model, task, ablation).values(prompts)
    runs = MaskedRuns(network, prompts, ablated)
    masks = [with_share(graph, share, seed) for seed, share in enumerate((0.02, 0.1, 0.5, 0.9, 0.99))]
    masks += [random_circuit(graph, 12, 0).kept, random_circuit(graph, 12, 1).complement().kept]
    masks += [graph.exists, torch.zeros_like(graph.exists), torch.zeros_like(graph.exists)]
    masks[-1][graph.edge_index("input->logits")] = True
    for kept in masks:
        residual = forward(network, prompts.tokens, kept=kept, ablated=ablated).residual
        expected = network.logits(at_answers(residual, prompts))
        found = runs.logits(kept)
        torch.testing.assert_close(found[prompts.answer_mask], expected[prompts.answer_mask], atol=1e-4, rtol=1e-4)


def test_without_each_edge_is_that_of_the_circuit_without_it(model):
    task = make_task(model, known_relation(model, 9), n=4)
    runs = MaskedRuns(model.network, task.val, make_ablation(model, task, "mean").values(task.val))
    for kept in (random_circuit(model.graph, 20, 2).kept, with_share(model.graph, 0.9)):
        edges = kept.nonzero()[:: max(1, int(kept.sum()) // 20)]
        found = dict(runs.without_each(kept, edges))
        assert sorted(found) == list(range(-1, len(edges)))
        torch.testing.assert_close(found[-1], runs.logits(kept))
        for i, edge in enumerate(edges):
            without = kept.clone()
            without[*edge] = False
            torch.testing.assert_close(found[i], runs.logits(without), atol=1e-4, rtol=1e-4)


def test_a_node_is_needed_where_its_kept_edges_lead(tiny):
    graph, kept = tiny("llama").graph, torch.zeros_like(tiny("llama").graph.exists)
    for edge in ("input->a0.h0<k>", "input->a0.h1<q>", "a0.h0->m0", "m0->logits", "a0.h1->a1.h1<q>", "m0->a1.h0<v>"):
        kept[graph.edge_index(edge)] = True
    found = dict(zip(graph.sender_names, needs(tiny("llama").network, kept).tolist(), strict=True))
    assert {name: need for name, need in found.items() if need} == {
        "input": Need.EVERYWHERE, "a0.h0": Need.ANSWERS, "m0": Need.ANSWERS,
    }  # fmt: skip


def test_heads_that_share_a_norm_are_needed_together(tiny):
    model = tiny("gemma2")
    graph, kept = model.graph, torch.zeros_like(model.graph.exists)
    kept[graph.edge_index("a0.h0->logits")] = True
    assert (needs(model.network, kept)[graph.head_senders(0)] == Need.ANSWERS).all()
