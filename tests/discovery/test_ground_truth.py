"""Circuits that are known edge by edge, and how well each method finds them.

The models are in `tests.handmade`. A method is scored by the area under the ROC curve of its edge scores against the
true edges: 1 if all true edges come first, 0.5 for random scores. `MEASURED` holds what each method reaches; where it
is less than 1, a test below shows why.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from jaxtyping import Bool
from sklearn.metrics import roc_auc_score
from torch import Tensor

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.discover import discover, score_edges
from kcwb.discovery.sequential import Pruned
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import Loss, answer_ranks, make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.task import Task, make_task
from tests.discovery.sequential import acdc_sequential
from tests.handmade import Handmade, copying_head, induction, key_value_lookup

MAKERS = {
    "copying": copying_head,
    "copying, saturated": lambda: copying_head(score=15.0),
    "induction": induction,
    "lookup": key_value_lookup,
}
ABLATIONS = ("zero", "mean", "resample")
#: Between what the weakest true edge costs (1.8 nats) and the strongest false one (0.03 nats), on every model.
TAU = 0.2
#: (model, ablation) -> edge ROC AUC of eap, eap-ig with 5 steps, exact effects; both ACDCs reach 1 everywhere.
MEASURED = {
    ("copying", "zero"): (1.0, 1.0, 1.0),
    ("copying", "mean"): (1.0, 1.0, 1.0),
    ("copying", "resample"): (1.0, 1.0, 1.0),
    ("copying, saturated", "zero"): (0.892, 1.0, 1.0),
    ("copying, saturated", "mean"): (1.0, 1.0, 1.0),
    ("copying, saturated", "resample"): (1.0, 1.0, 1.0),
    ("induction", "zero"): (0.862, 0.882, 1.0),
    ("induction", "mean"): (0.982, 1.0, 1.0),
    ("induction", "resample"): (1.0, 1.0, 1.0),
    ("lookup", "zero"): (1.0, 1.0, 1.0),
    ("lookup", "mean"): (1.0, 1.0, None),  # None: not run, to save time
    ("lookup", "resample"): (1.0, 1.0, None),
}
each_model = pytest.mark.parametrize("name", MAKERS)
each_ablation = pytest.mark.parametrize("ablation", ABLATIONS)


@cache
def handmade(name: str) -> tuple[Handmade, Task]:
    found = MAKERS[name]()
    return found, make_task(found.model, found.relation, n=8)


def mask(graph: Graph, names: frozenset[str]) -> Bool[Tensor, "S R"]:
    return Circuit.from_edges(graph, sorted(names)).kept


def measure(found: Handmade, task: Task, ablation: str) -> tuple[Loss, Ablation]:
    cuts = make_ablation(found.model, task, ablation)
    return make_loss(found.model, cuts.usable(task.val)), cuts


def edge_auc(graph: Graph, truth: frozenset[str], scores: Tensor) -> float:
    """Area under the ROC curve over the edges that exist; an edge without a score comes last."""
    values = scores[graph.exists].double()
    values = values.nan_to_num(nan=float(values[~values.isnan()].min()) - 1.0)
    return float(roc_auc_score(mask(graph, truth)[graph.exists].numpy(), values.numpy()))


@each_model
def test_the_model_answers_every_fact(name: str) -> None:
    found, task = handmade(name)
    prompts = encode(found.model, found.relation.facts, task.template, found.relation.objects)
    assert (prompts.ranks == 1).all()
    assert len(set(prompts.lengths.tolist())) > 1  # prompts of unequal length take part


@each_ablation
@each_model
def test_the_true_edges_suffice_and_each_is_needed(name: str, ablation: str) -> None:
    """What makes them the truth, whatever a method says: alone they answer every fact, and not without any of them."""
    found, task = handmade(name)
    loss, cuts = measure(found, task, ablation)
    kept = mask(found.model.graph, found.truth(ablation))
    alone = run_circuit(found.model, kept, loss.prompts, cuts)
    assert (answer_ranks(alone, loss.prompts) == 1).all()
    for edge in sorted(found.truth(ablation)):
        without = kept.clone()
        without[found.model.graph.edge_index(edge)] = False
        logits = run_circuit(found.model, without, loss.prompts, cuts)
        assert float(loss(logits)) > float(loss(alone)) + 1.2, edge  # a mean gives back where the first token is


def test_an_ablation_restores_what_is_the_same_on_every_prompt() -> None:
    """Under zero, attention takes a query and a key; resample gives them back where they only say which place it is."""
    found, _ = handmade("induction")
    assert found.truth("zero") - found.truth("resample") == {"input->a0.h1<q>", "input->a0.h1<k>"}
    assert found.truth("mean") == found.truth("zero")


@each_ablation
@each_model
def test_acdc_recovers_exactly_the_true_edges(name: str, ablation: str) -> None:
    found, task = handmade(name)
    circuit = discover(found.model, task, "acdc", tau=TAU, ablation=ablation, checkpoint=False, progress=False)
    edges = circuit.edges
    assert set(edges["sender"] + "->" + edges["receiver"]) == found.truth(ablation)
    assert circuit.scores is not None
    assert edge_auc(found.model.graph, found.truth(ablation), circuit.scores) == 1.0

    pruned = sequential(name, ablation)
    assert torch.equal(pruned.kept, circuit.kept)
    assert edge_auc(found.model.graph, found.truth(ablation), pruned.increases) == 1.0
    assert pruned.near_ties == 0


@cache
def sequential(name: str, ablation: str) -> Pruned:
    found, task = handmade(name)
    return acdc_sequential(found.model, *measure(found, task, ablation), tau=TAU)


@each_ablation
@each_model
def test_edge_auc_of_attribution_and_exact_effects(name: str, ablation: str) -> None:
    found, task = handmade(name)
    for method, measured in zip(("eap", "eap-ig", "exact"), MEASURED[name, ablation], strict=True):
        if measured is None:
            continue
        scores = score_edges(found.model, task, method, ablation=ablation, progress=False)
        auc = edge_auc(found.model.graph, found.truth(ablation), scores)
        assert auc == pytest.approx(measured, abs=0.02), method


@each_model
def test_random_scores_find_nothing(name: str) -> None:
    found, _ = handmade(name)
    graph = found.model.graph
    aucs = [edge_auc(graph, found.edges, torch.rand(graph.exists.shape)) for _ in range(100)]
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.04)


def test_eap_does_not_see_saturated_attention() -> None:
    """At a score of 15 the softmax is flat: to first order the mover needs neither query nor key, yet without either it
    fails. EAP-IG passes through points at which attention is not saturated."""
    found, task = handmade("copying, saturated")
    eap, ig, exact = (
        score_edges(found.model, task, method, ablation="zero", progress=False) for method in ("eap", "eap-ig", "exact")
    )
    for edge in ("input->a1.h2<q>", "input->a1.h2<k>"):
        index = found.model.graph.edge_index(edge)
        assert exact[index] > 2.0
        assert 0 < eap[index] < 1e-3
        assert ig[index] > 0.5


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_under_zero_attribution_is_blind_to_what_a_norm_reads_alone(method: str) -> None:
    """A norm gives the same for x and for (1 + e) x, so that its derivative along x is 0. A head of layer 0 reads
    `input` alone: under zero all scores of its edges are 0, at every point of the integral, whatever the head does (but
    for the norm's eps). The previous-token head is such a head."""
    found, task = handmade("induction")
    graph = found.model.graph
    scores = score_edges(found.model, task, method, ablation="zero", progress=False)
    assert scores[:, graph.attention_receivers(0)].abs().max() < 0.01
    exact = score_edges(found.model, task, "exact", ablation="zero", progress=False)
    for letter in "qkv":
        assert exact[graph.edge_index(f"input->a0.h1<{letter}>")] > 2.5


def test_under_zero_the_scores_into_any_receiver_cancel(tiny, words) -> None:
    """The same for any receiver of a model without biases: it reads sum_u a_u, and the scores are -a_u . gradient."""
    model = tiny("llama")
    task = make_task(model, words, n=4)
    scores = score_edges(model, task, "eap", ablation="zero", progress=False)
    assert scores.abs().max() > 0.1
    assert scores.sum(0).abs().max() < 1e-3


def test_of_two_equal_movers_acdc_keeps_one() -> None:
    """Cutting either alone costs little, so that the exact effect of an edge, which is above 2.8 nats where there is
    one mover, says that neither matters. ACDC cuts the one that it meets first, and then needs the other."""
    tau = 0.3
    found = copying_head(movers=(1, 2))
    task = make_task(found.model, found.relation, n=8)
    graph = found.model.graph
    exact = score_edges(found.model, task, "exact", ablation="zero", progress=False)
    assert max(float(exact[graph.edge_index(edge)]) for edge in found.edges) < tau
    circuit = discover(found.model, task, "acdc", tau=tau, ablation="zero", checkpoint=False, progress=False)
    edges = circuit.edges
    assert set(edges["sender"] + "->" + edges["receiver"]) == {edge for edge in found.edges if "a1.h1" in edge}
