"""A task in other words, with other partners, with shuffled answers: against encoding each prompt anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kcwb.errors import DataError
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.shots import make_shots
from kcwb.tasks.task import make_task
from kcwb.tasks.variants import in_other_words, with_other_partners, with_shuffled_answers
from tests.tasks import answer_ids, known_relation, prompt_ids, relation_of, unpadded_logits
from tests.tiny import WORDS

OTHER = "w1 w1 {} w2"


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 24), n=8)


def test_other_words_ask_the_same_facts(model, task):
    other = in_other_words(model, task, OTHER)
    for name in ("val", "test", "reference"):
        before, after = getattr(task, name), getattr(other, name)
        assert after.facts == before.facts and torch.equal(after.foils, before.foils)
        for i, fact in enumerate(after.facts):
            assert after.tokens[i, : after.lengths[i]].tolist() == prompt_ids(model, OTHER.replace("{}", fact.subject))
            alone = encode(model, [fact], OTHER, task.relation.objects)
            assert (int(after.ranks[i]), int(after.decides[i])) == (int(alone.ranks[0]), int(alone.decides[0]))
    assert other.template == OTHER and in_other_words(model, other, task.template).val.texts == task.val.texts


def test_other_words_keep_a_foil_that_was_named_though_the_facts_bring_wrong_answers(model):
    """By logits at END: the named foil's minus the answer's."""
    base = known_relation(model, 24)
    wrong = [f"{fact.object.split()[0]} w88" if " " in fact.object else "w88" for fact in base.facts]
    facts = [replace(fact, wrong=(word, "w87")) for fact, word in zip(base.facts, wrong, strict=True)]
    foil = next(word for word in WORDS[4:] if all(word not in fact.object.split() for fact in facts))
    task = make_task(model, relation_of(facts, base.prompt_templates_zs[0]), n=6, n_test=12, foil=foil)
    test = in_other_words(model, task, OTHER).test
    logits = torch.stack([unpadded_logits(model, fact, OTHER)[0].float() for fact in test.facts])
    found = make_loss(model, test, "logit_diff").per_prompt(torch.stack([logits, -logits], 1))
    own = [answer_ids(model, fact)[0] for fact in test.facts]
    expected = logits[:, WORDS.index(foil)] - logits[range(len(own)), own]
    assert any(" " in fact.object for fact in test.facts)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_prompt_that_holds_more_than_its_template_has_no_other_words(model):
    shots = make_shots(model, known_relation(model, 24), 1, n=4)
    with pytest.raises(DataError, match="no other words"):
        in_other_words(model, shots, OTHER)


def test_other_partners_are_as_long_and_answer_otherwise(model, task):
    drawn = [with_other_partners(task, seed) for seed in range(8)]
    known = {tuple(prompt_ids(model, task.template.replace("{}", fact.subject))): fact for fact in task.relation.facts}
    for other in drawn:
        for i, fact in enumerate(other.val.facts):
            length = int(other.val.lengths[i])
            partner = known[tuple(other.val.corrupted[i, :length].tolist())]
            assert answer_ids(model, partner)[0] != answer_ids(model, fact)[0] or partner == fact
            assert other.val.corrupted[i, length:].tolist() == other.val.tokens[i, length:].tolist()
        assert torch.equal(other.val.paired, task.val.paired) and torch.equal(other.val.tokens, task.val.tokens)
    assert any(not torch.equal(one.val.corrupted, drawn[0].val.corrupted) for one in drawn)
    assert torch.equal(with_other_partners(task, 3).val.corrupted, drawn[3].val.corrupted)


def test_other_partners_stand_after_the_same_demonstrations(model):
    shots = make_shots(model, known_relation(model, 40), 1, n=10)
    contexts = shots.context_of(shots.val)
    assert len(set(contexts)) == 2
    for seed in range(4):
        val = with_other_partners(shots, seed).val
        for i, place in enumerate(contexts):
            length, before = int(val.lengths[i]), prompt_ids(model, shots.contexts[place].text)
            assert val.corrupted[i, : len(before)].tolist() == before == val.tokens[i, : len(before)].tolist()
            assert not bool(val.paired[i]) or val.corrupted[i, :length].tolist() != val.tokens[i, :length].tolist()


def test_shuffled_answers_are_those_of_others(model, task):
    for seed in range(6):
        dealt = with_shuffled_answers(model, task, seed).val
        assert sorted(fact.object for fact in dealt.facts) == sorted(fact.object for fact in task.val.facts)
        assert [fact.subject for fact in dealt.facts] == [fact.subject for fact in task.val.facts]
        assert (dealt.answers[:, 0] != task.val.answers[:, 0]).all() and (dealt.foils != dealt.answers[:, 0]).all()
        anew = encode(model, dealt.facts, task.template, task.relation.objects)
        for name in ("tokens", "answers", "answer_mask", "lengths", "decides", "ranks"):
            assert torch.equal(getattr(dealt, name), getattr(anew, name)), name


def test_partners_keep_their_answers_places_when_answers_are_shuffled(model, task):
    dealt = with_shuffled_answers(model, task, 0).val
    for i, length in enumerate(task.val.lengths.tolist()):
        assert torch.equal(dealt.corrupted[i, :length], task.val.corrupted[i, :length])
        rest = dealt.tokens.shape[1] - length
        assert torch.equal(dealt.corrupted[i, length:], dealt.tokens[i, length : length + rest])


def test_answers_that_mostly_start_alike_cannot_be_shuffled(model):
    facts = known_relation(model, 8).facts
    same = [Fact(fact.subject, facts[0].object) for fact in facts[:5]]
    task = make_task(model, known_relation(model, 8), n=4)
    relation = relation_of([*same, *facts[5:]], task.template)
    val = encode(model, relation.facts, task.template, relation.objects)
    with pytest.raises(DataError, match="more than half"):
        with_shuffled_answers(model, replace(task, relation=relation, val=val), 0)
    first = val.answers[:, 0].tolist()
    others = [i for i in range(5, 8) if first[i] not in (first[0], *first[5:i])]
    with_shuffled_answers(model, replace(task, relation=relation, val=val.select([0, 1, *others[:2]])), 0)
