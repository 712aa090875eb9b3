"""Prompts after demonstrations and after controls, each against one prompt built by hand at a time."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from kcwb.errors import DataError, SettingError
from kcwb.models.loading import load_model
from kcwb.tasks.demonstrations import Context, deranged
from kcwb.tasks.relations import Fact
from kcwb.tasks.shots import GROUPS, KINDS, ShotTask, make_shots, shot_tasks
from kcwb.tasks.task import ask_again, make_task
from tests.tasks import known_relation, prompt_ids, relation_of
from tests.tiny import tiny_hf, tokenizer

TEMPLATE = "w1 {} w2"
WANTED = [(0, "shots"), (1, "shots"), (3, "shots"), (3, "shuffled"), (3, "unrelated")]


def others(n: int = 3):
    """Relations whose sentences have nothing to do with `known_relation`'s words."""
    facts = tuple(Fact(f"u{i}" if i % 2 else f"u{i} u", f"v{i}") for i in range(9))
    base = relation_of(facts)
    return [replace(base, name=f"other {i}", prompt_templates=(f"other{i} {{}} is",)) for i in range(n)]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_hf("llama"), tokenizer(), device="cpu")


@pytest.fixture(scope="module")
def relation(model):
    made = known_relation(model, 24)
    return replace(made, prompt_templates=(TEMPLATE,))


@pytest.fixture(scope="module")
def tasks(model, relation):
    return shot_tasks(model, relation, WANTED, n=4, n_test=6, sets=2, unrelated=others())


def halves(task: ShotTask):
    return [("val", task.val), ("test", task.test)]


# --- what is asked ---


def test_every_context_asks_the_same_facts(tasks):
    for task in tasks.values():
        assert task.val.facts == tasks[0, "shots"].val.facts and task.test.facts == tasks[0, "shots"].test.facts
        assert task.val.foils.equal(tasks[0, "shots"].val.foils)
    assert len(tasks[0, "shots"].val) == 4 and len(tasks[0, "shots"].test) == 6


def test_no_shot_is_the_question_alone(model, relation, tasks):
    """Encoded as `make_task` encodes it."""
    task = tasks[0, "shots"]
    alone = make_task(model, relation, template=TEMPLATE, n=len(relation.facts), n_test=len(relation.facts))
    ranks = dict(zip(alone.val.facts + alone.test.facts, [*alone.val.ranks, *alone.test.ranks], strict=True))
    for _, prompts in halves(task):
        assert prompts.texts == tuple(TEMPLATE.replace("{}", fact.subject) for fact in prompts.facts)
        assert [int(rank) for rank in prompts.ranks] == [int(ranks[fact]) for fact in prompts.facts]
    assert task.template == TEMPLATE and bool(task.val.known.all())


@pytest.mark.parametrize("wanted", WANTED[1:], ids=str)
def test_prompts_equal_prompts_made_one_by_one(model, tasks, wanted):
    """Text, tokens, spans, answers and ranks, from strings and the Hugging Face model alone."""
    task = tasks[wanted]
    for _, prompts in halves(task):
        for i, (fact, place) in enumerate(zip(prompts.facts, task.context_of(prompts), strict=True)):
            lines = [f"w1 {shown.subject} w2 {shown.object}" for shown in task.contexts[place].shown]
            if wanted[1] == "unrelated":
                lines = task.contexts[place].text.splitlines()
            text = "\n".join([*lines, f"w1 {fact.subject} w2"])
            assert prompts.texts[i] == text
            ids, answer = prompt_ids(model, text), prompt_ids(model, fact.object)
            length = len(ids)
            assert int(prompts.lengths[i]) == length
            assert prompts.tokens[i, : length + len(answer) - 1].tolist() == ids + answer[:-1]
            assert prompts.tokens[i, length + len(answer) - 1 :].eq(0).all()
            assert prompts.answers[i][prompts.answer_mask[i]].tolist() == answer
            start, stop = int(prompts.subject_start[i]), int(prompts.subject_stop[i])
            assert ids[start:stop] == prompt_ids(model, fact.subject) and stop == length - 1
            last = model.logits(torch.tensor([ids]))[0, -1]
            assert int(prompts.ranks[i]) == int((last >= last[answer[0]]).sum())


def test_a_k_shot_task_is_a_task_in_a_longer_template(model, relation):
    """With one set of demonstrations, `make_task` builds the same prompts."""
    task = make_shots(model, relation, 2, n=4, sets=1, n_test=2)
    plain = make_task(model, relation, template=task.template, n=len(relation.facts), n_test=0)
    for i, fact in enumerate(task.val.facts):
        if fact in plain.val.facts:
            j = plain.val.facts.index(fact)
            n = int(task.val.lengths[i])
            assert task.val.tokens[i, :n].equal(plain.val.tokens[j, :n])
            assert int(task.val.ranks[i]) == int(plain.val.ranks[j])
    shown = "\n".join(f"w1 {one.subject} w2 {one.object}" for one in task.contexts[0].shown)
    assert task.template == f"{shown}\n{TEMPLATE}"


def test_wrong_answers_of_the_facts_own_are_the_foils_of_every_context(model, relation):
    """Of answers of two tokens with the first in common the second is compared, as with no shot."""
    wrong = [[f"{fact.object.split()[0]} {word}" if " " in fact.object else word for word in ("w88", "w87")] for fact in
             relation.facts]  # fmt: skip
    some = [replace(fact, wrong=tuple(words)) for fact, words in zip(relation.facts, wrong, strict=True)]
    wanted = [(0, "shots"), (2, "shots")]
    none, two = shot_tasks(model, replace(relation, facts=tuple(some)), wanted, n=4, n_test=12, seed=3).values()
    assert none.test.compared.unique().tolist() == [0, 1] and bool((none.val.more_foils >= 0).all())
    for (_, before), (_, after) in zip(halves(none), halves(two), strict=True):
        for name in ("foils", "more_foils", "compared", "decides"):
            assert getattr(after, name).equal(getattr(before, name)), name


def test_the_same_prompts_are_asked_again_of_a_model(model, tasks):
    """Whichever set of demonstrations they begin with."""
    task = tasks[3, "shots"]
    again = ask_again(model, task)
    assert again.val.ranks.equal(task.val.ranks) and again.test.tokens.equal(task.test.tokens)


def test_where_no_space_stands_before_an_answer_none_is_shown(relation):
    facts = [replace(fact, space=False) for fact in relation.facts[:3]]
    assert Context.of(facts, TEMPLATE).text.splitlines() == [f"w1 {one.subject} w2{one.object}" for one in facts]
    assert all(not one.space for one in deranged(facts, relation, random.Random(0)))


def test_corrupted_prompts_have_the_same_context_and_another_subject(model, tasks):
    for wanted in WANTED:
        task = tasks[wanted]
        for _, prompts in halves(task):
            subjects = {fact.subject for fact in task.relation.facts}
            for i, place in enumerate(task.context_of(prompts)):
                if not prompts.paired[i]:
                    continue
                before = len(prompt_ids(model, task.contexts[place].text))
                start, stop = int(prompts.subject_start[i]), int(prompts.subject_stop[i])
                length = int(prompts.lengths[i])
                clean, other = prompts.tokens[i, :length].tolist(), prompts.corrupted[i, :length].tolist()
                assert clean[:before] == other[:before] and clean[start:stop] != other[start:stop]
                assert model.tokenizer.decode(other[start:stop]) in subjects and stop == length - 1
    assert bool(tasks[3, "shots"].val.paired.equal(tasks[0, "shots"].val.paired))


# --- what is shown ---


def test_demonstrations_are_true_nested_and_never_asked(relation, tasks):
    asked = {fact.subject for _, prompts in halves(tasks[3, "shots"]) for fact in prompts.facts}
    for one, three in zip(tasks[1, "shots"].contexts, tasks[3, "shots"].contexts, strict=True):
        assert set(three.shown) <= set(relation.facts) and len(set(three.shown)) == 3
        assert one.shown == three.shown[:1]
        assert not asked & {fact.subject for fact in three.shown}
    assert tasks[3, "shots"].contexts[0] != tasks[3, "shots"].contexts[1]


def test_shuffled_labels_are_each_others_and_all_wrong(relation, tasks):
    truth = {fact.subject: fact.object for fact in relation.facts}
    for plain, shuffled in zip(tasks[3, "shots"].contexts, tasks[3, "shuffled"].contexts, strict=True):
        assert [fact.subject for fact in plain.shown] == [fact.subject for fact in shuffled.shown]
        assert all(fact.object != truth[fact.subject] for fact in shuffled.shown)
        distinct = len({fact.object for fact in plain.shown}) == 3
        assert not distinct or {fact.object for fact in plain.shown} == {fact.object for fact in shuffled.shown}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("n_objects", [2, 3, 24])
def test_labels_are_wrong_however_few_objects_there_are(relation, k, n_objects):
    objects = [f"w{60 + i % n_objects}" for i in range(24)]
    facts = tuple(Fact(fact.subject, name) for fact, name in zip(relation.facts, objects, strict=True))
    for seed in range(20):
        draw = random.Random(seed)
        shown = draw.sample(facts, k)
        wrong = deranged(shown, replace(relation, facts=facts), draw)
        assert [fact.subject for fact in wrong] == [fact.subject for fact in shown]
        assert all(a.object != b.object and a.object in objects for a, b in zip(wrong, shown, strict=True))
        most = max(Counter(fact.object for fact in shown).values())
        if 2 * most <= k:  # then they can all be swapped among themselves
            assert Counter(fact.object for fact in wrong) == Counter(fact.object for fact in shown)


def test_labels_of_a_single_object_cannot_be_shuffled(model, relation):
    alike = replace(relation, facts=tuple(Fact(fact.subject, "w60") for fact in relation.facts))
    with pytest.raises(DataError, match="cannot be shuffled"):
        make_shots(model, alike, 2, "shuffled")


def test_unrelated_text_has_exactly_as_many_tokens_and_names_nothing(model, relation, tasks):
    shots, other = tasks[3, "shots"], tasks[3, "unrelated"]
    names = {name for fact in relation.facts for name in (fact.subject, fact.object)}
    for (_, left), (_, right) in zip(halves(shots), halves(other), strict=True):
        assert left.lengths.equal(right.lengths)
        assert left.subject_start.equal(right.subject_start)
    for context in other.contexts:
        assert not names & set(context.text.split()) and not context.shown
        assert context.text.endswith("\n") and "is" in context.text.split()


def test_the_mean_is_taken_after_unrelated_text_of_the_same_length(model, relation, tasks):
    task = tasks[3, "shots"]
    prompts = task.reference
    shown = {fact.subject for context in task.contexts for fact in context.shown}
    before = [
        text.removesuffix(TEMPLATE.replace("{}", fact.subject))
        for text, fact in zip(prompts.texts, prompts.facts, strict=True)
    ]
    assert len(set(before)) > 2 and not any(name in text.split() for name in shown for text in before)
    lengths = dict(zip(task.val.facts, task.val.lengths.tolist(), strict=True))
    both = [i for i, fact in enumerate(prompts.facts) if fact in lengths]
    assert both and all(int(prompts.lengths[i]) == lengths[prompts.facts[i]] for i in both)
    assert tasks[3, "shuffled"].reference is prompts
    alone = tasks[0, "shots"].reference
    assert alone.texts == tuple(TEMPLATE.replace("{}", fact.subject) for fact in alone.facts)


def test_other_relations_sentences_that_name_something_are_left_out(model, relation):
    naming = replace(others()[0], prompt_templates=(f"see {relation.facts[0].subject} {{}} is",))
    with pytest.raises(DataError, match="names something of tiny"):
        make_shots(model, relation, 2, "unrelated", unrelated=[naming])


def test_groups_tell_the_parts_of_a_prompt_apart(model, tasks):
    task = tasks[3, "shots"]
    groups = task.groups(model, task.test)
    steps = torch.arange(task.test.tokens.shape[1])
    assert groups.sum(0).equal((steps[None] <= task.test.ends[:, None]).long())
    for i, place in enumerate(task.context_of(task.test)):
        shown = task.contexts[place].shown
        for name, words in {
            "object": " ".join(fact.object for fact in shown),
            "subject": " ".join(fact.subject for fact in shown),
            "words": " ".join([*(["w1"] if model.prepend_bos else []), "w2", *["w1 w2"] * 2]),
            "question": f"w1 {task.test.facts[i].subject} w2",
        }.items():
            found = task.test.tokens[i][groups[GROUPS.index(name), i]].tolist()
            assert found == prompt_ids(model, words), name
        assert groups[GROUPS.index("first"), i].nonzero().tolist() == [[0]]


# --- order, and what is refused ---


def test_tasks_repeat_and_differ_by_seed(model, relation, tasks):
    again = make_shots(model, relation, 3, "unrelated", n=4, n_test=6, sets=2, unrelated=others())
    assert again.contexts == tasks[3, "unrelated"].contexts
    assert again.val.tokens.equal(tasks[3, "unrelated"].val.tokens)
    elsewhere = make_shots(model, relation, 3, "unrelated", n=4, n_test=6, sets=2, seed=1, unrelated=others())
    assert elsewhere.contexts != again.contexts


def test_more_shots_than_can_be_set_aside_are_refused_with_counts(model, relation):
    with pytest.raises(DataError, match="9 shots: tiny has 24 facts, of which 8 are set aside"):
        make_shots(model, relation, 9)


def test_shots_that_overflow_the_context_are_refused_before_anything_is_computed(model, relation, monkeypatch):
    long = replace(relation, prompt_templates=(" ".join(["w1 {}", *["w2"] * 12]),))
    monkeypatch.setattr("kcwb.tasks.shots.encode", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(DataError, match=r"5 shots of tiny make prompts of up to \d+ tokens, of which \d+ are"):
        make_shots(model, long, 5, "unrelated", unrelated=others())


def test_a_relation_that_the_model_does_not_know_is_refused_with_counts(model):
    unknown = replace(known_relation(model, 24, unknown=24), prompt_templates=(TEMPLATE,))
    with pytest.raises(DataError, match=r"knows none of the 16 facts .* best rank is \d+"):
        make_shots(model, unknown, 1)


@pytest.mark.parametrize(
    "wrong", [{"k": -1}, {"kind": "shot"}, {"n": 0}, {"sets": 0}, {"n_test": -1}, {"template": 1}], ids=str
)
def test_settings_that_cannot_be_meant_are_refused(model, relation, wrong):
    with pytest.raises(SettingError):
        make_shots(model, relation, **{"k": 1, **wrong})


@pytest.mark.model
def test_the_built_in_model_reads_demonstrations_and_controls_of_one_length(smollm2):
    tasks = shot_tasks(smollm2, "country_capital", [(0, "shots"), *((2, kind) for kind in KINDS)], n=2, n_test=2)
    shots = tasks[2, "shots"]
    for kind in KINDS:
        task = tasks[2, kind]
        assert task.val.lengths.equal(shots.val.lengths) and task.reference.lengths.equal(shots.reference.lengths)
        for _, prompts in halves(task):
            for i, text in enumerate(prompts.texts):
                ids = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
                assert prompts.tokens[i, : int(prompts.lengths[i])].tolist() == ids
                assert text.endswith(f"\nThe capital of {prompts.facts[i].subject} is")
    i, context = 0, shots.contexts[shots.context_of(shots.val)[0]]
    groups = shots.groups(smollm2, shots.val)
    for name, words in {"object": "object", "subject": "subject"}.items():
        found = smollm2.tokenizer.decode(shots.val.tokens[i][groups[GROUPS.index(name), i]].tolist())
        assert found.split() == " ".join(getattr(fact, words) for fact in context.shown).split()


def test_no_shuffled_line_is_true_where_several_answers_are(relation):
    facts = [Fact(f"w{i}", f"w{40 + i}", also=(f"w{41 + i}",)) for i in range(3)]
    some = replace(relation, facts=(*facts, Fact("w9", "w43")))
    for seed in range(20):
        for fact, shown in zip(facts, deranged(facts, some, random.Random(seed)), strict=True):
            assert shown.object not in fact.right
