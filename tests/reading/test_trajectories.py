"""Right answer and rival: who they are by the Hugging Face model, and where they stand by the lens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kcwb.reading.lens import lens_by_fact
from kcwb.reading.trajectories import read_trajectories
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, make_task
from tests.handmade import copying_head
from tests.tasks import known_relation, unpadded_logits


def whole_task(model, relation: Relation) -> Task:
    """A task whose D_val is all of the relation's facts, in order."""
    task = make_task(model, relation, n=1)
    return replace(task, val=encode(model, relation.facts, task.template, relation.objects))


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "opt"])
def test_answers_are_those_of_the_hugging_face_model(tiny, name):
    model = tiny(name)
    relation = known_relation(model, 12, unknown=6)
    prompts = encode(model, relation.facts, relation.template(0), relation.objects)
    found = read_trajectories(model, prompts)
    assert 0 < int(found.right.sum()) < 12
    for n, fact in enumerate(relation.facts):
        logits = unpadded_logits(model, fact)[0]
        probabilities = logits.softmax(-1)
        gold = int(prompts.answers[n, 0])
        others = logits.clone()
        others[gold] = -math.inf
        assert found.tokens[n].tolist() == [gold, int(others.argmax())]
        assert bool(found.right[n]) == (int(logits.argmax()) == gold)
        assert float(found.max_probability[n]) == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert float(found.entropy[n]) == pytest.approx(float(-(probabilities * probabilities.log()).sum()), abs=1e-4)
        above = logits[found.tokens[n]] - logits.mean()
        torch.testing.assert_close(found.logits[n], above, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The object begins")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_readings_equal_the_lens_for_both_tokens(tiny, name):
    """The lens reads a task's answers; for the rivals it is given a task that has them as its answers."""
    model = tiny(name)
    task = whole_task(model, known_relation(model, 8, unknown=3))
    found = read_trajectories(model, task.val)
    for i in range(2):
        asked = replace(task, val=replace(task.val, answers=found.tokens[:, i : i + 1]))
        table = lens_by_fact(model, asked, progress=False).set_index(["who", "subject", "layer"])
        for w, who in ((0, "object"), (2, "object, subject's tokens")):
            compared = [n for n, fact in enumerate(task.val.facts) if (who, fact.subject, 0) in table.index]
            assert len(compared) >= 6  # where the rival is a token of the subject the lens leaves the fact out
            for n in compared:
                own = table.loc[who].loc[task.val.facts[n].subject]
                assert found.ranks[w, :, n, i].tolist() == own["rank"].tolist()
                assert found.probabilities[w, :, n, i].tolist() == pytest.approx(own["probability"].tolist(), abs=1e-6)


def test_the_last_token_of_a_subject_is_one_of_its_tokens(tiny):
    model = tiny("llama")
    relation = known_relation(model, 9)
    prompts = encode(model, relation.facts, relation.template(0), relation.objects)
    found = read_trajectories(model, prompts)
    assert (found.ranks[1] >= found.ranks[2]).all() and (found.probabilities[1] <= found.probabilities[2]).all()
    single = (prompts.subject_stop - prompts.subject_start) == 1
    assert single.any() and not single.all()
    torch.testing.assert_close(found.ranks[1][:, single], found.ranks[2][:, single])
    assert (found.ranks[1] != found.ranks[2])[:, ~single].any()


def test_arrival_is_the_first_layer_of_rank_ten():
    found = read_trajectories(
        copying_head().model, encode(copying_head().model, copying_head().relation.facts, "we think that the {} is", [])
    )
    for w in range(3):
        for n in range(16):
            ranks = found.ranks[w, :, n, 0].tolist()
            first = next((layer for layer, rank in enumerate(ranks, start=-1) if rank <= 10), 2)
            assert int(found.arrival[w, n, 0]) == first
    assert set(found.arrival.unique().tolist()) > {1, 2}  # both arrivals and none


def test_small_batches_read_the_same(tiny, monkeypatch):
    model = tiny("llama")
    relation = known_relation(model, 7)
    prompts = encode(model, relation.facts, relation.template(0), relation.objects)
    whole, seen = read_trajectories(model, prompts), []
    monkeypatch.setattr("kcwb.models.memory.memory_budget", lambda device: 1)
    parts = read_trajectories(model, prompts, seen.append)
    assert seen == [1] * 7
    assert torch.equal(whole.ranks, parts.ranks) and torch.equal(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.probabilities, parts.probabilities)


def test_of_several_right_answers_the_likeliest_is_followed_and_none_is_the_rival(tiny):
    model = tiny("llama")
    facts, seen = known_relation(model, 9).facts, set()
    for fact in facts:
        logits = unpadded_logits(model, fact)[0]
        best = [f"w{token - 4}" for token in logits.argsort(descending=True).tolist() if token >= 4]
        for right in ((best[5], best[0], best[2]), (best[1], best[6], best[40])):
            prompts = encode(model, [replace(fact, object=right[0], also=right[1:])], "w1 {} w2", [])
            found, tokens = read_trajectories(model, prompts), {*model.tokenizer.convert_tokens_to_ids([*right])}
            gold = max(tokens, key=lambda token: float(logits[token]))
            rival = max(set(range(len(logits))) - tokens, key=lambda token: float(logits[token]))
            assert found.tokens[0].tolist() == [gold, rival]
            assert bool(found.right[0]) == (float(logits[gold]) > float(logits[rival]))
            assert found.ranks[0, -1, 0].tolist() == [int((logits >= logits[token]).sum()) for token in (gold, rival)]
            seen.add(bool(found.right[0]))
    assert seen == {True, False}
