"""The logit lens: equal to transformer_lens's, and right on models whose layers are known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.tools.analysis.logit_lens import logit_lens

from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model, load_model
from kcwb.reading.lens import WHO, arrival, lens, lens_by_fact
from kcwb.tasks.pairs import read_pairs
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, load_relation
from kcwb.tasks.task import Task, make_task
from tests.handmade import Handmade, copying_head, key_value_lookup
from tests.tasks import prompt_ids, relation_of, spaced_tokenizer
from tests.tiny import tiny_hf

OBJECT, SUBJECT, AT_SUBJECT = WHO
made = cache(lambda make: make())


def task_of(found: Handmade) -> Task:
    return make_task(found.model, found.relation, n=8)


def bridge_standing(model: Model, prompts: Prompts, row: int, token: int, position: int) -> tuple[list, np.ndarray]:
    """Ranks from 1 and probabilities per layer, by transformer_lens."""
    tokens = prompts.tokens[row : row + 1, : int(prompts.lengths[row])]
    logits = logit_lens(model.bridge, tokens, positions=position).values.reshape(model.graph.n_layers + 1, -1)
    ranks = (logits >= logits[:, token, None]).sum(-1)
    return ranks.tolist(), logits.softmax(-1)[:, token].numpy()


def check_against_the_bridge(model: Model, task: Task, rows: list[int]) -> None:
    table = lens_by_fact(model, task, progress=False)
    for row in rows:
        prompts, fact = task.val, task.val.facts[row]
        mine = table[(table["subject"] == fact.subject) & (table["object"] == fact.object)]
        answer = int(prompts.answers[row, 0])
        ranks, probabilities = bridge_standing(model, prompts, row, answer, int(prompts.ends[row]))
        at_end = mine[mine["who"] == OBJECT].sort_values("layer")
        assert at_end["layer"].tolist() == list(range(-1, model.graph.n_layers))
        np.testing.assert_allclose(at_end["rank"], ranks, rtol=1e-3)  # far down, two tokens may be a rounding apart
        np.testing.assert_allclose(at_end["probability"], probabilities, rtol=1e-3, atol=1e-7)
        spans = range(int(prompts.subject_start[row]), int(prompts.subject_stop[row]))
        there = [bridge_standing(model, prompts, row, answer, position) for position in spans]
        at_subject = mine[mine["who"] == AT_SUBJECT].sort_values("layer")
        np.testing.assert_allclose(at_subject["rank"], np.min([ranks for ranks, _ in there], axis=0), rtol=1e-3)
        best = np.max([probabilities for _, probabilities in there], axis=0)
        np.testing.assert_allclose(at_subject["probability"], best, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "opt"])
def test_it_equals_the_lens_of_transformer_lens(tiny, words, name):
    task = make_task(tiny(name), words, n=12)
    check_against_the_bridge(tiny(name), task, list(range(min(4, len(task.val)))))


def test_the_subjects_own_rank_is_that_of_its_first_token(tiny, words):
    model = tiny("gpt2")
    task = make_task(model, words, n=6)
    table = lens_by_fact(model, task, progress=False)
    for row, fact in enumerate(task.val.facts):
        token = int(task.val.tokens[row, task.val.subject_start[row]])
        mine = table[(table["subject"] == fact.subject) & (table["who"] == SUBJECT)].sort_values("layer")
        assert mine["rank"].tolist() == bridge_standing(model, task.val, row, token, int(task.val.ends[row]))[0]


def test_the_subject_is_looked_for_as_it_would_follow_the_prompt_with_a_space_or_without():
    model = load_model(tiny_hf("llama"), spaced_tokenizer(), device="cpu")
    rows = {"clean": ["w1 w2 w3", "w4 w5\n"], "answer": ["w10", "w11"], "subject": ["w1", "w4"]}
    facts = read_pairs(pd.DataFrame(rows)).facts
    prompts = encode(model, facts, "{}", ["w10", "w11"])
    parts = {"val": prompts, "test": prompts.select([]), "reference": prompts}
    task = Task(model.name, model.digest, relation_of(facts, "{}"), "{}", 2, 0, **parts, n_known=2, n_facts=2)
    last = lens_by_fact(model, task, progress=False).query("layer == 1 and who == @SUBJECT")
    for fact, rank, word in zip(facts, last["rank"], (" w1", "w4"), strict=True):
        logits = model.logits(torch.tensor([prompt_ids(model, fact.subject)]))[0, -1]
        token = model.tokenizer.convert_tokens_to_ids(word)
        assert rank == int((logits >= logits[token]).sum())


def test_a_fact_that_stands_twice_arrives_once(tiny, words):
    """As in the second hop of two chains."""
    task = make_task(tiny("llama"), words, n=8)
    twice = replace(task, val=task.val.select([0, 1, 1]))
    once = arrival(tiny("llama"), replace(task, val=task.val.select([0, 1])), progress=False)
    pd.testing.assert_frame_equal(arrival(tiny("llama"), twice, progress=False), once)


def test_the_last_layer_is_the_models_own_answer(tiny, words):
    task = make_task(tiny("llama"), words, n=8)
    table = lens_by_fact(tiny("llama"), task, progress=False)
    last = table[(table["layer"] == 1) & (table["who"] == OBJECT)]
    assert last["rank"].tolist() == task.val.ranks.tolist()


def test_means_and_intervals_are_over_facts(tiny, words):
    model = tiny("llama")
    task = make_task(model, words, n=8)
    by_fact, table = lens_by_fact(model, task, progress=False), lens(model, task, progress=False)
    some = by_fact[(by_fact["layer"] == 0) & (by_fact["who"] == OBJECT)]
    cells = table[(table["layer"] == 0) & (table["who"] == OBJECT)].set_index("quantity")
    assert cells.loc["rank", "value"] == pytest.approx(math.exp(np.log(some["rank"]).mean()))
    assert cells.loc["probability", "value"] == pytest.approx(some["probability"].mean())
    assert cells.loc["hit_10", "value"] == pytest.approx((some["rank"] <= 10).mean())
    draw = np.random.default_rng(0)
    again = np.exp([np.log(draw.choice(some["rank"], len(some))).mean() for _ in range(4000)])
    assert cells.loc["rank", "low"] == pytest.approx(np.quantile(again, 0.025), rel=0.1)
    assert cells.loc["rank", "high"] == pytest.approx(np.quantile(again, 0.975), rel=0.1)
    assert (table["low"] <= table["value"] + 1e-9).all() and (table["value"] <= table["high"] + 1e-9).all()
    pd.testing.assert_frame_equal(table, lens(model, task, progress=False))


def test_one_fact_has_no_interval(tiny, words):
    task = make_task(tiny("llama"), words, n=4)
    subject = task.test.facts[0].subject
    table = lens(tiny("llama"), task, fact=subject, progress=False)
    assert (table["facts"] == 1).all() and table[["low", "high"]].isna().all(axis=None)
    assert len(table) == 3 * 3 * 3  # layers, quantities, who


@pytest.mark.parametrize(("make", "mover"), [(copying_head, 1), (key_value_lookup, 2)])
def test_a_fact_is_said_at_end_from_the_movers_layer_on(make, mover):
    """Of either model the layer of the mover is known, and where the subject stands the object is never said."""
    found = made(make)
    table = lens_by_fact(found.model, task_of(found), progress=False)
    said = table.pivot_table(index="layer", columns="who", values="probability", aggfunc=["min", "max"])
    assert said["max", OBJECT].loc[: mover - 1].max() < 0.2 < 0.7 < said["min", OBJECT].loc[mover]
    assert said["max", AT_SUBJECT].max() < 0.2


def test_arrival_counts_a_rank_that_does_not_stay(tiny, words, monkeypatch):
    rows = [
        ("s", "o", layer, who, rank, 0.0)
        for who, ranks in {OBJECT: [50, 9, 30, 3], SUBJECT: [1] * 4, AT_SUBJECT: [99] * 4}.items()
        for layer, rank in enumerate(ranks, start=-1)
    ]
    table = pd.DataFrame(rows, columns=["subject", "object", "layer", "who", "rank", "probability"])
    monkeypatch.setattr("kcwb.reading.lens.lens_by_fact", lambda *_, **__: table)
    row = arrival(tiny("llama"), make_task(tiny("llama"), words, n=2)).iloc[0]
    assert (row["at_end"], row["stays"], row["rank"]) == (0, 2, 3) and row["at_subject"] is pd.NA


# --- what is refused ---


def test_an_unknown_fact_names_the_nearest(tiny, words):
    task = make_task(tiny("llama"), words, n=4)
    with pytest.raises(DataError, match=r"no fact about 'w1x'.*'w"):
        lens(tiny("llama"), task, fact="w1x", progress=False)
    with pytest.raises(SettingError, match="split"):
        lens(tiny("llama"), task, split="train", progress=False)
    with pytest.raises(DataError, match="has no facts"):
        lens(tiny("llama"), replace(task, test=task.test.select([])), split="test", progress=False)


def test_a_subject_that_is_its_object_is_refused(tiny, words):
    model = tiny("llama")
    task = make_task(model, words, n=2)
    facts = [Fact("w5", "w5"), Fact("w6", "w46")]
    task = replace(task, val=encode(model, facts, task.template, words.objects))
    with pytest.raises(DataError, match="copying passes for knowing: 'w5' -> 'w5'"):
        lens(model, task, fact="w5", progress=False)
    with pytest.warns(UserWarning, match="left out"):
        assert (lens(model, task, progress=False)["facts"] == 1).all()


# --- the built-in model ---


@pytest.mark.model
def test_on_the_built_in_model(smollm2):
    relation = load_relation("country_capital")
    task = make_task(smollm2, replace(relation, facts=relation.facts[:8]), n=3)
    check_against_the_bridge(smollm2, task, [0])
    table = arrival(smollm2, task, progress=False)
    assert table["at_end"].min() >= 20  # capitals arrive in the last third of the layers
