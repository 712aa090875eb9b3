"""Sequential ACDC: the definition, on a graph small enough to follow by hand, and what must hold of any result."""

from __future__ import annotations

import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.sequential import layer_order, receiver_order, sender_order
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import make_task
from tests.discovery.sequential import acdc_sequential


def test_receivers_are_visited_from_the_output_to_the_input() -> None:
    graph = Graph(2, 2)
    names = [graph.receiver_names[column] for column in receiver_order(graph)]
    assert names[:4] == ["logits", "m1", "a1.h1<v>", "a1.h1<k>"]
    assert names[4:8] == ["a1.h1<q>", "a1.h0<v>", "a1.h0<k>", "a1.h0<q>"]
    assert names[-1] == "a0.h0<q>" and sorted(names) == sorted(graph.receiver_names)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_order_permutes_the_heads_of_a_layer_and_nothing_else(seed: int | None) -> None:
    graph = Graph(3, 4)
    columns, rows = receiver_order(graph, seed), sender_order(graph, seed).tolist()
    assert sorted(columns) == list(range(graph.n_receivers)) and sorted(rows) == list(range(graph.n_senders))
    names = [graph.receiver_names[column] for column in columns]
    assert [name for name in names if name[0] != "a"] == ["logits", "m2", "m1", "m0"]
    heads = [name[:-3] for name in names if name.endswith("<v>")]
    assert [name for name in (graph.sender_names[row] for row in rows) if name[0] == "a"] == heads
    assert [name[1] for name in heads] == list("222211110000")
    assert [names[names.index(f"{head}<v>") + i] for head in heads for i in (1, 2)] == [
        f"{head}<{letter}>" for head in heads for letter in "kq"
    ]
    assert [graph.sender_names[row] for row in rows if graph.sender_names[row][0] != "a"] == ["m2", "m1", "m0", "input"]


def test_orders_are_drawn_alike() -> None:
    """Of two heads either comes first in half of the layers."""
    first = layer_order(Graph(4000, 2), 7)[:, 0].float().mean()
    assert 0.46 < float(first) < 0.54


@pytest.mark.parametrize("metric", ["nll", "kl", "logit_diff"])
@pytest.mark.parametrize("absolute", [False, True])
def test_every_decision_follows_the_definition(tiny, words: Relation, metric: str, absolute: bool) -> None:
    """Replay the visits: each increase is the one that the mask of that moment gives, each decision its test."""
    model, tau = tiny("gpt2"), 0.05
    task = make_task(model, words, n=2)
    cuts = make_ablation(model, task, "zero")
    loss = make_loss(model, task.val, metric)
    pruned = acdc_sequential(model, loss, cuts, tau=tau, absolute=absolute)

    def measure(kept: torch.Tensor) -> float:
        return float(loss(run_circuit(model, kept, task.val, cuts)))

    kept, graph, evaluations = model.graph.exists.clone(), model.graph, 1
    for column in receiver_order(graph):
        node = int(graph.receiver_node[column])
        unread = node < graph.n_senders and not pruned.kept[node].any()
        for row in reversed(range(graph.senders_before(column))):
            increase = pruned.increases[row, column]
            if unread:
                assert increase.isnan() and not pruned.kept[row, column]
                kept[row, column] = False
                continue
            without = kept.clone()
            without[row, column] = False
            assert float(increase) == pytest.approx(measure(without) - measure(kept), abs=1e-5)
            cut = (abs(increase) if absolute else increase) < tau
            assert bool(pruned.kept[row, column]) != bool(cut)
            kept = without if cut else kept
            evaluations += 1
    assert torch.equal(kept, pruned.kept)
    assert pruned.evaluations == evaluations
    assert pruned.loss == pytest.approx(measure(kept), abs=1e-5)


def test_a_huge_tau_cuts_everything_and_a_tiny_one_keeps_what_hurts(tiny, words: Relation) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=2)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    assert not acdc_sequential(model, loss, cuts, tau=1e6).kept.any()
    assert acdc_sequential(model, loss, cuts, tau=1e-6).kept.sum() > 10


def test_near_ties_are_counted(tiny, words: Relation) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=2)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    # The first edge to be visited is the last sender's into the logits; its increase does not depend on tau.
    first = float(acdc_sequential(model, loss, cuts, tau=0.05, absolute=True).increases[-1, -1])
    assert acdc_sequential(model, loss, cuts, tau=abs(first), absolute=True).near_ties >= 1
    assert acdc_sequential(model, loss, cuts, tau=abs(first) + 1e-3, absolute=True).near_ties == 0
