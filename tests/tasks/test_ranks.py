"""Which token tells an answer apart, and ranks of answers of several tokens: against slow loops and by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.editing.cases import edit_cases
from kcwb.errors import DataError
from kcwb.tasks.metrics import answer_ranks, at_answers, hit_at_k
from kcwb.tasks.prompts import encode
from kcwb.tasks.ranks import NEVER, WORST, deciding_tokens, rank_product
from kcwb.tasks.relations import Fact, Relation, load_relation
from kcwb.tasks.shots import make_shots
from kcwb.tasks.task import make_task
from tests.tasks import TEMPLATE, answer_ids, relation_of, slow_rank

#: Objects of one to three tokens; all but the last two begin as another one does.
SHARED = ["w40 w1", "w40 w2 w3", "w40 w2 w4", "w41 w5", "w41 w6", "w42", "w43 w7"]


def shared_relation(n: int = 14, objects=SHARED) -> Relation:
    facts = [Fact(f"w{10 + i}" if i % 3 else f"w{10 + i} w9", objects[i % len(objects)]) for i in range(n)]
    return relation_of(facts)


# The token that decides


def test_an_answer_is_decided_by_the_first_token_that_no_other_object_shares():
    objects = {"1732": [1, 7, 3, 2], "1735": [1, 7, 3, 5], "1801": [1, 8, 0, 1], "now": [9], "S": [5], "Si": [5, 6]}
    assert deciding_tokens([*objects], [*objects.values()], objects) == [3, 3, 1, 0, NEVER, 1]


def test_an_object_is_not_told_apart_from_itself_but_from_others_with_the_same_tokens():
    unknown = {"ж": [3], "я": [3], "a": [4]}
    assert deciding_tokens(["ж", "a", "a"], [[3], [4], [4]], unknown) == [NEVER, 0, 0]


def test_an_answer_outside_the_relation_is_told_apart_from_its_objects():
    assert deciding_tokens(["new", "old"], [[1, 2], [7]], {"other": [1, 3]}) == [1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_deciding_tokens_are_those_of_comparing_all_pairs(seed):
    draw = random.Random(seed)
    objects = {f"o{i}": [draw.randrange(6) for _ in range(draw.randint(1, 5))] for i in range(12)}
    expected = []
    for name, tokens in objects.items():
        others = [other for key, other in objects.items() if key != name]
        places = [i for i in range(len(tokens)) if all(other[: i + 1] != tokens[: i + 1] for other in others)]
        expected.append(min(places, default=NEVER))
    assert deciding_tokens([*objects], [*objects.values()], objects) == expected
    assert {NEVER, 0, 1} <= set(expected)


def test_the_rank_is_the_product_up_to_the_token_that_decides():
    ranks, decides = torch.tensor([[2, 3, 9], [4, 5, 6], [1, 1, 1]]), torch.tensor([1, 0, NEVER])
    assert rank_product(ranks, decides).tolist() == [6, 4, WORST]
    assert rank_product(ranks.expand(2, 3, 3), decides).tolist() == [[6, 4, WORST]] * 2


def test_a_rank_ends_at_its_worst_and_does_not_overflow():
    assert rank_product(torch.full((1, 8), 150_000), torch.tensor([7])).tolist() == [WORST]


# Prompts


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_ranks_are_those_of_one_token_of_one_prompt_at_a_time(tiny, name):
    model, relation = tiny(name), shared_relation()
    prompts = encode(model, relation.facts, TEMPLATE, relation.objects)
    expected = [slow_rank(model, fact, relation.objects) for fact in relation.facts]
    assert prompts.ranks.tolist() == expected
    assert answer_ranks(at_answers(model.logits(prompts.tokens), prompts), prompts).tolist() == expected
    assert prompts.decides.tolist() == [1, 2, 2, 1, 1, 0, 0] * 2
    assert prompts.told_at_end.tolist() == [False] * 5 + [True] * 2 + [False] * 5 + [True] * 2


def test_candidates_are_ranked_like_runs_of_their_own(tiny):
    model, relation = tiny("llama"), shared_relation()
    prompts = encode(model, relation.facts, TEMPLATE, relation.objects)
    logits = at_answers(model.logits(prompts.tokens), prompts)
    noisy = logits + torch.randn(2, *logits.shape, generator=torch.Generator().manual_seed(0))
    for one, found in zip(noisy, answer_ranks(noisy, prompts), strict=True):
        assert found.equal(answer_ranks(one, prompts))
        for n, fact in enumerate(prompts.facts):
            product = 1
            for i, token in enumerate(answer_ids(model, fact)[: int(prompts.decides[n]) + 1]):
                product *= sum(value >= float(one[n, i, token]) for value in one[n, i].tolist())
            assert int(found[n]) == product


def test_select_keeps_what_decides(tiny):
    relation = shared_relation()
    prompts = encode(tiny("llama"), relation.facts, TEMPLATE, relation.objects)
    assert prompts.select([2, 5]).decides.tolist() == [2, 0]


# Facts that no token tells apart


def test_a_task_leaves_out_facts_whose_tokens_begin_another_object(tiny):
    relation = shared_relation(16, ["w40", "w40 w1", "w41", "w42"])
    with pytest.warns(UserWarning, match=r"4 of 16 facts of tiny .*\('w40'\): left out"):
        task = make_task(tiny("llama"), relation, n=2, n_test=99)
    assert task.n_facts == 12 and len(task.val) + len(task.test) == 12
    assert all(fact.object != "w40" for fact in task.val.facts + task.test.facts + task.reference.facts)
    assert (task.val.decides >= 0).all()


def test_objects_that_are_all_unknown_words_are_refused(tiny):
    with pytest.raises(DataError, match=r"8 of 8 facts of tiny .*'Париж'"):
        make_task(tiny("llama"), shared_relation(8, ["Париж", "Токио", "Рим"]))


def test_shots_leave_them_out_too(tiny):
    relation = replace(shared_relation(18, ["w40", "w40 w1", "w41", "w42"]), prompt_templates=(TEMPLATE,))
    with pytest.warns(UserWarning, match="left out"):
        task = make_shots(tiny("llama"), relation, 1, n=2, n_test=99)
    asked = [*task.val.facts, *task.test.facts]
    assert len(asked) == task.n_facts and all(fact.object != "w40" for fact in asked)
    for prompts in (task.val, task.test):
        assert prompts.decides.tolist() == [int(fact.object == "w40 w1") for fact in prompts.facts]


# The built-in model


def rotated(subjects: str, objects: str, by: int, template: str) -> Relation:
    names, given = subjects.split(), objects.split()
    facts = [Fact(name, given[(i + by) % len(given)]) for i, name in enumerate(names)]
    return Relation("rotated", "factual", "s", "o", False, (template,), (template,), tuple(facts))


def cyrillic(by: int) -> Relation:
    """Capitals in Russian, of which all first tokens are one byte; wrong ones where they are rotated."""
    return rotated(
        "Франция Япония Россия Польша Италия Китай Египет Греция", "Париж Токио Москва Варшава Рим Пекин Каир Афины",
        by, "Столица страны {} это город",
    )  # fmt: skip


def wrong_years() -> Relation:
    """Presidents, each with the birth year of another one, never their own."""
    relation = load_relation("president_birth_year")
    years = [fact.object for fact in relation.facts]
    facts = []
    for i, fact in enumerate(relation.facts):
        shift = next(n for n in range(7, 45) if years[(i + n) % len(years)] != fact.object)
        facts.append(Fact(fact.subject, years[(i + shift) % len(years)]))
    return replace(relation, facts=tuple(facts))


@pytest.mark.model
@pytest.mark.parametrize("relation", [cyrillic(3), wrong_years()], ids=lambda one: one.name)
def test_false_facts_are_not_known_though_their_first_token_is(smollm2, relation):
    text = relation.template(0)
    prompts = encode(smollm2, relation.facts, text, relation.objects)
    at_end = smollm2.logits(prompts.tokens)[torch.arange(len(prompts)), prompts.ends]
    first = (at_end >= at_end.gather(-1, prompts.answers[:, :1])).sum(-1)
    assert (first <= 10).float().mean() > 0.8
    assert prompts.known.float().mean() < 0.25  # of the years, 10 of 39 by chance


@pytest.mark.model
def test_the_empty_circuit_does_not_know_years(smollm2):
    task = make_task(smollm2, "president_birth_year", n=8)
    logits = run_circuit(smollm2, Circuit.empty(smollm2.graph), task.val, make_ablation(smollm2, task, "mean"))
    first = replace(task.val, decides=torch.zeros_like(task.val.decides))
    assert hit_at_k(logits, first).float().mean() == 1
    assert hit_at_k(logits, task.val).float().mean() < 0.3


@pytest.mark.model
def test_no_edit_is_made_of_a_fact_that_is_not_known(smollm2):
    relation = cyrillic(3)
    twice = replace(
        relation, facts=(*relation.facts, *(Fact(f"{one.subject} и", one.object) for one in relation.facts))
    )
    with pytest.raises(DataError, match="knows no fact"):
        edit_cases(smollm2, [twice], n=5)
