"""Sets of edits, from relations and from files in CounterFact's format."""

from __future__ import annotations

import json

import pytest
import torch

from kcwb.editing.cases import edit_cases, load_counterfact
from kcwb.errors import DataError
from kcwb.tasks.relations import Fact, load_relation
from tests.tasks import prompt_ids, relation_of


def test_cases_are_known_facts_with_neighbours_of_the_same_object(model):
    facts = [Fact(f"w{10 + i} w{20 + i}", f"w{60 + i % 3}") for i in range(12)] + [Fact("w1", "w89")]
    relation = relation_of(facts, "w1 {} w2", "{} w3", "w4 {} w5")
    cases = edit_cases(model, [relation], n=6, rank=model.network.d_vocab, neighbours=2, others=3)
    assert len(cases) == 6 and len({case.fact for case in cases}) == 6
    for case in cases:
        assert case.fact in facts and case.target in relation.objects and case.target != case.fact.object
        assert case.fact.subject != "w1"  # its object is its alone
        same = [f"w1 {one.subject} w2" for one in facts if one.object == case.fact.object and one != case.fact]
        assert len(case.neighbours) == 2 and set(case.neighbours) <= set(same)
        assert case.paraphrases == (f"{case.fact.subject} w3", f"w4 {case.fact.subject} w5")
        assert len(case.other_subjects) == 3 and case.same_subject == ()
    assert cases == edit_cases(model, [relation], n=6, rank=model.network.d_vocab, neighbours=2, others=3)
    assert cases != edit_cases(model, [relation], n=6, rank=model.network.d_vocab, neighbours=2, others=3, seed=1)


def test_where_no_neighbours_are_asked_no_fact_needs_one(model):
    relation = relation_of([Fact(f"w{10 + i}", f"w{60 + i}") for i in range(4)])
    cases = edit_cases(model, [relation], n=9, rank=model.network.d_vocab, neighbours=0)
    assert {case.fact for case in cases} == {*relation.facts} and not any(case.neighbours for case in cases)
    with pytest.raises(DataError, match="shares its object"):
        edit_cases(model, [relation], rank=model.network.d_vocab)


def test_only_known_facts_are_edited(model):
    facts = [Fact(f"w{10 + i}", f"w{60 + i % 2}") for i in range(20)]
    relation = relation_of(facts)
    some = edit_cases(model, [relation], n=20, rank=60)
    assert 0 < len(some) < 20
    for case in some:
        logits = model.logits(torch.tensor([prompt_ids(model, case.prompt)]))[0, -1]
        answer = prompt_ids(model, case.fact.object)[-1]
        assert int((logits >= logits[answer]).sum()) <= 60
    with pytest.raises(DataError, match="knows no fact"):
        edit_cases(model, [relation_of([Fact("w1", "w2"), Fact("w3", "w4")])], n=2)


def test_no_target_begins_the_true_object_or_with_it(model):
    """An edit from w60 to w60 w1 could not be told from none by any token."""
    objects = ["w60", "w60 w1", "w61", "w62 w2 w3", "w62 w2"]
    facts = [Fact(f"w{10 + i}", objects[i % 5]) for i in range(20)]
    cases = edit_cases(model, [relation_of(facts)], n=20, rank=10**8)
    assert {case.fact.object for case in cases} == {"w60 w1", "w61", "w62 w2 w3"}  # the others are never known
    for case in cases:
        true, new = case.fact.object.split(), case.target.split()
        assert true != new and any(a != b for a, b in zip(true, new, strict=False))
    assert len({case.target for case in cases}) > 2


def test_a_composed_fact_follows_from_the_new_object_in_the_relations():
    from kcwb.editing.cases import _compositions

    landmarks = load_relation("landmark_country")
    capitals, languages = load_relation("country_capital"), load_relation("country_language")
    fact = next(one for one in landmarks.facts if one.object == "France")
    found = list(_compositions("landmark_country", fact, "Italy", [capitals, languages]))
    assert [pair for _, *pair in found] == [["Rome", "Paris"], ["Italian", "French"]]
    assert f"the country that has the landmark {fact.subject}" in found[0][0]
    assert not list(_compositions("landmark_country", fact, "France", [capitals]))
    assert not list(_compositions("antonym", fact, "Italy", [capitals]))


# --- CounterFact ---

RECORD = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The tower of {} stands in",
        "relation_id": "P0",
        "target_new": {"str": "Lisbon", "id": "Q1"},
        "target_true": {"str": "Prague", "id": "Q2"},
        "subject": "Old Grey Hall",
    },
    "paraphrase_prompts": ["Visitors of Old Grey Hall travel to "],
    "neighborhood_prompts": ["The tower of New Red Hall stands in", "The tower of Stone Gate stands in"],
    "generation_prompts": ["Near Old Grey Hall"],
}


def test_a_file_in_counterfact_s_format_becomes_cases(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([RECORD]), encoding="utf-8")
    (case,) = load_counterfact(path)
    assert case.fact == Fact("Old Grey Hall", "Prague") and case.target == "Lisbon"
    assert case.prompt == "The tower of Old Grey Hall stands in"
    assert case.paraphrases == ("Visitors of Old Grey Hall travel to",) and len(case.neighbours) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["requested_rewrite"].pop("subject"), "record 1.*subject"),
        (lambda r: r["requested_rewrite"].update(target_new="Lisbon"), "record 1"),
        (lambda r: r["requested_rewrite"].update(prompt="no mark"), "record 1.*exactly once"),
        (lambda r: r.update(neighborhood_prompts=[""]), "record 1.*empty"),
        (lambda r: r.update(paraphrase_prompts="a text"), "record 1.*lists"),
        (lambda r: r["requested_rewrite"].update(target_new={"str": "Prague "}), "record 1.*nothing to edit"),
        (lambda r: r.update(requested_rewrite=[1]), "record 1"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, change, words):
    wrong = json.loads(json.dumps(RECORD))
    change(wrong)
    path = tmp_path / "own.json"
    path.write_text(json.dumps([RECORD, wrong]), encoding="utf-8")
    with pytest.warns(UserWarning, match=words):
        assert len(load_counterfact(path)) == 1
    path.write_text(json.dumps([wrong]), encoding="utf-8")
    with pytest.raises(DataError, match=words.replace("record 1", "record 0")):
        load_counterfact(path)


@pytest.mark.parametrize("key", ["paraphrase_prompts", "neighborhood_prompts"])
def test_a_record_without_paraphrases_or_neighbours_is_an_edit_all_the_same(tmp_path, key):
    without, null = ({k: v for k, v in RECORD.items() if k != key}, {**RECORD, key: None})
    path = tmp_path / "own.json"
    path.write_text(json.dumps([without, null]), encoding="utf-8")
    for case in load_counterfact(path):
        assert () in (case.paraphrases, case.neighbours) and case.fact == Fact("Old Grey Hall", "Prague")


@pytest.mark.parametrize("content", ["", "{}", "[]", "[1]"])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    path = tmp_path / "own.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"own\.json"):
        load_counterfact(path)
    with pytest.raises(DataError, match="There is no file"):
        load_counterfact(tmp_path / "none.json")
