"""Prompts by rule: what they call right is right, and the corrupted ones differ from them where they should."""

from __future__ import annotations

import re

import pytest

from kcwb.errors import SettingError
from kcwb.reading.roles import head_roles
from kcwb.tasks import generators
from kcwb.tasks.task import make_task
from kcwb.tasks.tokens import encode_one

ALL = [
    generators.ioi_pairs,
    generators.greater_than_pairs,
    generators.docstring_pairs,
    generators.addition_pairs,
]


@pytest.mark.parametrize("generate", ALL)
def test_the_same_seed_gives_the_same_prompts_and_another_one_others(generate):
    one, again, other = generate(30, seed=1), generate(30, seed=1), generate(30, seed=2)
    assert one == again and one.digest != other.digest and len(one.facts) == 30
    assert one.of_prompts and all(fact.wrong and fact.corrupted and fact.named for fact in one.facts)


def test_in_ioi_the_receiver_is_right_the_giver_wrong_and_a_third_name_gives_in_the_corrupted_prompt():
    for fact in generators.ioi_pairs(60).facts:
        start, stop = fact.span
        (giver,) = fact.wrong
        assert fact.named == giver and len(re.findall(rf"\b{giver}\b", fact.subject)) == 2
        assert len(re.findall(rf"\b{fact.object}\b", fact.subject)) == 1
        third = fact.corrupted[start : len(fact.corrupted) - (len(fact.subject) - stop)]
        assert fact.corrupted == fact.subject[:start] + third + fact.subject[stop:]
        assert third not in fact.subject


def test_in_greater_than_right_years_are_greater_and_wrong_ones_smaller():
    for fact in generators.greater_than_pairs(60).facts:
        year, century = re.search(r"(\d{4}).*?(\d\d)$", fact.subject).groups()  # type: ignore[union-attr]
        assert year[:2] == century and fact.named == year[2] and not fact.space
        assert all(int(century + digit + "0") > int(year) for digit in fact.right) and "9" in fact.right
        assert all(int(century + digit + "9") < int(year) for digit in fact.wrong) and "0" in fact.wrong
        assert fact.corrupted == fact.subject.replace(year, f"{century}0{year[3]}")
    for fact in generators.greater_than_pairs(20, whole=True).facts:
        year = int(re.search(r"\d{4}", fact.subject)[0][2:])  # type: ignore[index]
        assert fact.right == tuple(f"{k:02}" for k in range(year + 1, 100)) and len(fact.wrong) == year


def test_in_docstring_the_parameter_that_follows_the_described_ones_is_right():
    for fact in generators.docstring_pairs(60).facts:
        names = re.search(r"\((.*)\)", fact.subject)[1].split(", ")  # type: ignore[index]
        described = re.findall(r"(?::param|@param) (\w+):", fact.subject)
        place = names.index(fact.object)
        assert names[place - 2 : place] == described == list(fact.wrong)
        assert fact.named == described[1] and fact.span[0] > fact.subject.index("\n")
        head, tail = fact.subject.split("\n", 1)
        assert fact.corrupted.endswith("\n" + tail) and not fact.corrupted.startswith(head)
        assert not set(names) - {"self"} & set(re.search(r"\((.*)\)", fact.corrupted)[1].split(", "))  # type: ignore[index]


@pytest.mark.parametrize("carry", [None, True, False])
def test_in_addition_the_sum_is_right(carry):
    for fact in generators.addition_pairs(40, carry=carry).facts:
        a, b = map(int, fact.named.split(" + "))
        assert int(fact.object) == a + b and fact.object not in fact.wrong and len(fact.wrong) == 9
        assert carry is None or (a % 10 + b % 10 > 9) == carry
        assert {name[0] for name in fact.wrong} == {fact.object[0]}
        c, d = map(int, fact.corrupted[slice(*fact.span)].split(" + "))
        assert (c + d) // 10 != (a + b) // 10


def test_more_prompts_than_there_are_is_refused(monkeypatch):
    for name, words in {"_NAMES": ["Mary", "John", "Kate"], "_PLACES": ["park"], "_THINGS": ["ball"]}.items():
        monkeypatch.setattr(generators, name, words)
    assert len(generators.ioi_pairs(60).facts) == 5 * 3 * 2 * 2
    with pytest.raises(SettingError, match="ioi: there are not many more than 60 different prompts; n=61 is too large"):
        generators.ioi_pairs(61)


@pytest.mark.model
@pytest.mark.parametrize("generate", ALL)
def test_corrupted_prompts_have_as_many_tokens_of_the_built_in_model(smollm2, generate):
    for fact in generate(60).facts:
        row = encode_one(smollm2, fact, "{}")
        assert row.corrupted is not None and len(row.corrupted) == len(row.prompt)
        differ = [i for i, (a, b) in enumerate(zip(row.prompt, row.corrupted, strict=True)) if a != b]
        assert differ and (generate is not generators.ioi_pairs or differ == [row.start])


@pytest.mark.model
def test_the_built_in_model_knows_ioi_and_has_heads_for_it(smollm2):
    task = make_task(smollm2, generators.ioi_pairs(10, seed=3), n=4, n_test=0)
    assert task.n_known >= 9 and bool(task.val.paired.all())
    roles = head_roles(smollm2, None, task, shuffles=20, resamples=2, progress=False)
    assert (roles["role"] != "too few to say").all()
