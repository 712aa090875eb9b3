"""Stability of circuits, against scoring every draw and every template anew; and pairs computed by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover
from kcwb.errors import DataError, SettingError
from kcwb.evaluation import stability as module
from kcwb.evaluation.stability import bootstrap_stability, template_stability
from kcwb.models.graph import Graph
from kcwb.tasks.prompts import encode, make_task
from kcwb.tasks.relations import Fact
from tests.tasks import TEMPLATE, known_relation, prompt_ids, relation_of
from tests.tiny import tiny_model

COLUMNS = ["left", "right", "left_edges", "right_edges", "jaccard", "random"]
TEMPLATES = ("w1 {} w2", "{} w2", "w1 w1 {} w2")


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 16), n=5)


def test_pairs_are_the_jaccards_counted_by_hand():
    graph = Graph(1, 1)
    through_head = ["input->a0.h0<v>", "a0.h0->logits"]
    circuits = {
        "a": Circuit.from_edges(graph, through_head),
        "b": Circuit.from_edges(graph, [*through_head, "input->logits"]),
        "c": Circuit.from_edges(graph, ["input->logits"]),
        "none": Circuit.empty(graph),
    }
    table = module._pairs(circuits, seed=5)
    assert list(table.columns) == COLUMNS
    jaccard = table.set_index(["left", "right"])["jaccard"]
    assert jaccard.to_dict() == {
        ("a", "b"): 2 / 3, ("a", "c"): 0, ("a", "none"): 0, ("b", "c"): 1 / 3, ("b", "none"): 0, ("c", "none"): 0,
    }  # fmt: skip
    random = [random_circuit(graph, size, 5 + i) for i, size in enumerate([2, 3, 1])]
    expected = [random[0].iou(random[1]), random[0].iou(random[2]), random[1].iou(random[2])]
    some = table[table["right"] != "none"]
    assert some["random"].tolist() == expected
    assert table[table["right"] == "none"]["random"].isna().all()
    assert (some["left_edges"].tolist(), some["right_edges"].tolist()) == ([2, 2, 3], [3, 1, 1])


# Bootstrap


@pytest.mark.parametrize(
    ("method", "ablation", "metric"),
    [("eap", "zero", "nll"), ("eap", "resample", "logit_diff"), ("eap-ig", "mean", "nll"), ("eap-ig", "mean", "kl")],
)
@pytest.mark.parametrize("select", ["signed", "absolute"])
def test_a_draw_is_the_circuit_of_its_facts_scored_anew(tiny, method, ablation, metric, select):
    model = tiny("gpt2")
    task = make_task(model, known_relation(model, 24), n=5)
    settings = {"metric": metric, "ablation": ablation, "edges": 40, "select": select}
    more = {"steps": 3} if method == "eap-ig" else {}
    table = bootstrap_stability(model, task, method, draws=4, seed=3, progress=False, **more, **settings)
    counts = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), 4)
    circuits = {}
    for i, count in enumerate([np.ones(5, int), *counts]):
        rows = np.repeat(np.arange(5), count).tolist()
        drawn = replace(task, val=task.val.select(rows))
        name = f"draw {i}" if i else "D_val"
        circuits[name] = discover(model, drawn, method, progress=False, **settings, **more)
    assert list(zip(table["left"], table["right"], strict=True)) == list(combinations(circuits, 2))
    for row in table.itertuples():
        left, right = circuits[row.left], circuits[row.right]
        assert (row.left_edges, row.right_edges) == (left.n_edges, right.n_edges)
        assert row.jaccard == pytest.approx(left.iou(right), abs=1e-9)


def test_exact_effects_are_resampled_too():
    model = tiny_model("gpt2", n_layer=1, n_head=2)
    task = make_task(model, known_relation(model, 8), n=3)
    settings = {"ablation": "mean", "edges": 8}
    table = bootstrap_stability(model, task, "exact", draws=2, seed=1, progress=False, **settings)
    counts = np.random.default_rng(1).multinomial(3, np.full(3, 1 / 3), 2)
    whole = discover(model, task, "exact", progress=False, **settings)
    for draw, count in enumerate(counts, 1):
        rows = np.repeat(np.arange(3), count).tolist()
        circuit = discover(model, replace(task, val=task.val.select(rows)), "exact", progress=False, **settings)
        row = table[(table["left"] == "D_val") & (table["right"] == f"draw {draw}")].iloc[0]
        assert row["jaccard"] == pytest.approx(whole.iou(circuit))


def test_stability_repeats_and_the_seed_draws_others(model, task):
    settings = {"draws": 6, "edges": 40, "progress": False}
    one, again, other = (bootstrap_stability(model, task, "eap", seed=seed, **settings) for seed in (0, 0, 1))
    assert one.equals(again) and not one.equals(other)
    assert list(one.columns) == COLUMNS and len(one) == 7 * 6 / 2
    assert (one["left_edges"] <= 40).all()


def test_an_empty_circuit_has_no_random_one_beside_it(model, task):
    """One percent of a tiny graph is a single edge, which leads nowhere."""
    table = bootstrap_stability(model, task, "eap", draws=2, progress=False)
    assert (table["left_edges"] == 0).all() and table["random"].isna().all()


def test_the_full_graph_is_stable_and_so_is_its_random_counterpart(model, task):
    table = bootstrap_stability(model, task, "eap", edges=model.graph.n_edges, draws=2, progress=False)
    assert (table[["jaccard", "random"]] == 1).all(axis=None)


def test_circuits_of_the_same_facts_agree_more_than_random_ones(model, task):
    table = bootstrap_stability(model, task, "eap-ig", edges=60, draws=8, progress=False)
    assert table["jaccard"].mean() > 1.3 * table["random"].mean()


def test_one_fact_cannot_be_drawn_again(model):
    task = make_task(model, known_relation(model, 8), n=1)
    with pytest.raises(DataError, match="single fact"):
        bootstrap_stability(model, task, "eap", progress=False)


def test_facts_without_a_partner_are_not_drawn_under_resample(model):
    facts = known_relation(model, 18).facts
    lonely = next(fact for fact in facts if len(fact.subject.split()) == 3)
    chosen = [fact for fact in facts if len(fact.subject.split()) == 1] + [lonely]
    relation = relation_of(chosen)
    everything = encode(model, relation.facts, TEMPLATE, relation.objects)
    task = replace(make_task(model, relation, n=3), val=everything)
    assert everything.paired.sum() == len(chosen) - 1
    with pytest.warns(UserWarning, match=lonely.subject):
        bootstrap_stability(model, task, "eap", ablation="resample", draws=1, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "acdc"},
        {"metric": "loss"},
        {"ablation": "none"},
        {"select": "best"},
        {"edges": 0},
        {"edges": 10**6},
        {"draws": 0},
        {"steps": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_errors_before_any_work(model, task, wrong, monkeypatch):
    monkeypatch.setattr(module, "make_ablation", None)
    with pytest.raises(SettingError, match=str(next(iter(wrong.values())))):
        bootstrap_stability(model, task, progress=False, **wrong)


def test_eap_with_kl_is_refused_since_its_gradient_is_zero_at_the_full_model(model, task, relation):
    with pytest.raises(SettingError, match="eap-ig"):
        bootstrap_stability(model, task, "eap", metric="kl", progress=False)
    with pytest.raises(SettingError, match="eap-ig"):
        template_stability(model, relation, "eap", metric="kl", progress=False)


def test_a_task_of_other_weights_is_refused(model):
    stranger = tiny_model("llama", seed=1)
    with pytest.raises(SettingError, match="weights"):
        bootstrap_stability(model, make_task(stranger, known_relation(stranger, 8), n=3), progress=False)


def test_progress_counts_the_facts(model, task):
    calls = []
    bootstrap_stability(model, task, "eap", draws=2, progress=lambda *call: calls.append(call[:2]))
    assert calls[-1] == (5, 5) and calls == sorted(calls)


# Templates


@pytest.fixture
def relation(model):
    """Facts whose objects are known in the first template; some of them in the others too."""
    facts = []
    for i in range(30):
        subject = f"w{10 + i}"
        ranks = sum(_ranks(model, template.replace("{}", subject)) for template in TEMPLATES)
        best = [token for token in ranks.argsort().tolist() if token >= 4]
        facts.append(Fact(subject, f"w{best[i % 3] - 4}"))
    return relation_of(facts, *TEMPLATES)


def _ranks(model, text):
    logits = model.logits(torch.tensor([prompt_ids(model, text)]))[0, -1]
    return logits.argsort(descending=True).argsort()


def test_templates_are_compared_on_the_same_facts_scored_one_template_at_a_time(model, relation):
    table = template_stability(model, relation, n=4, edges=50, seed=2, progress=False)
    assert list(table.columns) == ["left", "right", "facts", *COLUMNS[2:]]
    assert list(zip(table["left"], table["right"], strict=True)) == list(combinations(TEMPLATES, 2))
    everything = [encode(model, relation.facts, text, relation.objects) for text in TEMPLATES]
    known = [i for i in range(30) if all(prompts.known[i] for prompts in everything)]
    assert len(known) >= 4 and (table["facts"] == 4).all()
    facts = sorted(np.random.default_rng(2).permutation(known)[:4].tolist())
    circuits = {}
    for text, prompts in zip(TEMPLATES, everything, strict=True):
        task = replace(make_task(model, relation, 4, 2, text), val=prompts.select(facts))
        circuits[text] = discover(model, task, edges=50, progress=False)
    for row in table.itertuples():
        left, right = circuits[row.left], circuits[row.right]
        assert (row.left_edges, row.right_edges) == (left.n_edges, right.n_edges)
        assert row.jaccard == left.iou(right)
        seeds = [2 + TEMPLATES.index(name) for name in (row.left, row.right)]
        random = [random_circuit(model.graph, one.n_edges, s) for one, s in zip((left, right), seeds, strict=True)]
        assert row.random == random[0].iou(random[1])


def test_templates_are_named_by_index_or_by_text(model, relation):
    settings = {"n": 3, "edges": 30, "progress": False}
    by_index = template_stability(model, relation, "eap", templates=[0, 2], **settings)
    by_text = template_stability(model, relation, "eap", templates=[TEMPLATES[0], TEMPLATES[2]], **settings)
    assert by_index.equals(by_text) and len(by_index) == 1


@pytest.mark.parametrize("templates", [[], [0], [1, 1], ["w1 {} w2", "w1 {} w2"]])
def test_fewer_than_two_templates_are_an_error(model, relation, templates):
    with pytest.raises(SettingError, match="two"):
        template_stability(model, relation, templates=templates, progress=False)


def test_facts_that_no_two_templates_share_are_an_error_in_words(model):
    """One fact is known in the first template alone, another in the second alone."""
    facts = []
    for i, (yes, no) in enumerate([(0, 1), (1, 0)]):
        subject = f"w{20 + i}"
        inside, outside = (_ranks(model, TEMPLATES[place].replace("{}", subject)) for place in (yes, no))
        token = next(t for t in inside.argsort().tolist() if t >= 4 and inside[t] < 10 <= outside[t])
        facts.append(Fact(subject, f"w{token - 4}"))
    relation = relation_of(facts, *TEMPLATES[:2])
    with pytest.raises(DataError, match=re.escape("1 in 'w1 {} w2', 1 in '{} w2'")):
        template_stability(model, relation, progress=False)


def test_settings_of_templates_that_cannot_be_meant_are_errors(model, relation):
    for wrong in ({"method": "acdc"}, {"n": 0}, {"steps": 0}, {"edges": 0}, {"templates": [0, 9]}):
        with pytest.raises(SettingError):
            template_stability(model, relation, progress=False, **wrong)
