"""Chains of two relations, their words, and relations asked backwards; files in the format of MQuAKE."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from kcwb.errors import DataError, SettingError
from kcwb.tasks.compose import BACKWARDS, DESCRIPTIONS, QUESTIONS, Chain, Wording, compose, compositions, reverse
from kcwb.tasks.mquake import load_mquake
from kcwb.tasks.relations import Fact, Relation, load_relation, load_relations

WORDS = [("the place of {}", "the capital of {} is")]


def relation(name: str, *pairs: tuple[str, str], symmetric: bool = False) -> Relation:
    facts = tuple(Fact(*pair) for pair in pairs)
    return Relation(name, "factual", "thing", "thing", symmetric, ("{} is",), ("{} is", "it is {} and"), facts)


PLACE = relation("place", ("tower", "France"), ("Wall of China", "China"), ("Paris", "France"), ("bridge", "Mali"))
CAPITAL = relation("capital", ("France", "Paris"), ("China", "Beijing"), ("Peru", "Lima"))

# --- compose ---


def test_a_chain_goes_on_where_the_first_object_is_a_second_subject():
    found = compose(PLACE, CAPITAL, wordings=WORDS)
    assert found.chains == (Chain("tower", "France", "Paris"),)
    assert found.counts == {
        "facts of place": 4,
        "go on in capital": 3,
        "object is the bridge": 0,
        "object in the subject": 1,  # Paris -> France -> Paris
        "bridge in the subject": 1,  # Wall of China -> China
    }
    assert found.name == "place__capital" and "1 chains over 1 bridges to 1 objects" in repr(found)


def test_an_object_that_is_its_bridge_is_dropped():
    city = relation("city", ("shop", "Singapore"), ("park", "Peru"))
    capital = relation("capital", ("Singapore", "singapore"), ("Peru", "Lima"))
    found = compose(city, capital, wordings=WORDS)
    assert found.chains == (Chain("park", "Peru", "Lima"),) and found.counts["object is the bridge"] == 1


def test_a_composition_is_a_relation_of_its_own():
    found = compose("landmark_country", "country_capital").relation
    capitals = {fact.subject: fact.object for fact in load_relation("country_capital").facts}
    places = {fact.subject: fact.object for fact in load_relation("landmark_country").facts}
    assert len(found.facts) > 50
    assert all(capitals[places[fact.subject]] == fact.object for fact in found.facts)
    assert (found.domain_name, found.range_name, found.relation_type) == ("landmark", "city", "two-hop")
    assert found.prompt_templates_zs[0] == "The capital of the country where the landmark {} is located is"


def test_relations_without_a_common_entity_are_refused_with_counts():
    with pytest.raises(DataError, match=r"share no entity: none of the 3 objects .*France.* among the 2 subjects"):
        compose(PLACE, relation("size", ("Lima", "big"), ("Rome", "big")), wordings=WORDS)


def test_a_composition_of_copies_alone_is_refused_with_counts():
    with pytest.raises(DataError, match=r"no chain is left.*object in the subject: 10"):
        compose("country_largest_city", "city_country", wordings=[("the largest city of {}", "{} lies in")])


@pytest.mark.parametrize(
    ("wordings", "said"),
    [([], "at least one pair"), (None, "no words to describe the object of place"), ([("x", "of {}")], "exactly once")],
)
def test_words_that_cannot_be_filled_are_refused(wordings, said):
    with pytest.raises((SettingError, DataError), match=said):
        compose(PLACE, CAPITAL, wordings=wordings)


def test_a_wording_that_does_not_exist_is_refused():
    with pytest.raises(SettingError, match="has 1 wordings, 0 to 0"):
        compose(PLACE, CAPITAL, wordings=WORDS).wording(1)


@pytest.mark.parametrize(
    ("description", "question", "alone"),
    [
        ("the country with the dish {}", "The capital of {} is", "The capital of the country with the dish is"),
        ("the author of the book {}", "{} speaks", "the author of the book speaks"),
        ("the city of {}", "In {} they pay with the", "In the city they pay with the"),
        ("{}", "Q: Where was the maker of {} born? A:", "Q: Where was the maker born? A:"),
        ("{} there", "w3 {}", "w3 there"),
    ],
)
def test_the_relation_alone_is_the_question_without_its_subject(description, question, alone):
    assert Wording(description, question).relation_alone == alone


# --- what comes with the package ---


def test_every_packaged_pair_has_at_least_two_wordings():
    table = compositions(least=1)
    assert len(table) >= 20 and {"first", "second", "chains", "bridges", "objects", "dropped"} == set(table)
    for pair in table.itertuples():
        found = compose(pair.first, pair.second)
        templates = [wording.template for wording in found.wordings]
        assert len(set(templates)) >= 2 and len(found.chains) == pair.chains
        for text in templates:
            assert text.count("{}") == 1 and text[0].isupper() and text[-1].isalpha() and "  " not in text


def test_the_table_of_compositions_counts_what_a_slow_search_finds():
    relations = {one.name: one for one in load_relations()}
    for pair in compositions().itertuples():
        first, second = relations[pair.first], relations[pair.second]
        chains = []
        for one in first.facts:
            for two in second.facts:
                words = one.subject.lower()
                copied = two.object.lower() in words or one.object.lower() in words or one.object == two.object
                if one.object == two.subject and not copied:
                    chains.append((one.object, two.object))
        assert (pair.chains, pair.bridges) == (len(chains), len({bridge for bridge, _ in chains}))
        assert pair.objects == len({answer for _, answer in chains}) and pair.chains >= 10


def test_words_belong_to_packaged_relations():
    names = {one.name for one in load_relations()}
    for table in (DESCRIPTIONS, QUESTIONS, BACKWARDS):
        assert set(table) <= names
        for texts in table.values():
            assert len(set(texts)) >= 2 and all(text.count("{}") == 1 for text in texts)


# --- backwards ---


def test_a_reversed_relation_keeps_objects_of_one_subject():
    found = reverse(PLACE, templates=["what is in {} is"])
    assert found.facts == (Fact("China", "Wall of China"), Fact("Mali", "bridge"))
    assert found.name == "place_reversed" and found.prompt_templates_zs == ("what is in {} is",)


def test_every_packaged_relation_with_words_can_be_reversed():
    for name in BACKWARDS:
        forward, back = load_relation(name), reverse(name)
        pairs = {(fact.subject, fact.object) for fact in forward.facts}
        assert len(back.facts) >= 10 and all((fact.object, fact.subject) in pairs for fact in back.facts)


def test_a_symmetric_relation_is_asked_in_its_own_words():
    assert reverse("antonym").prompt_templates_zs == load_relation("antonym").prompt_templates_zs


def test_what_cannot_be_reversed_is_refused():
    with pytest.raises(SettingError, match="no templates that ask place backwards"):
        reverse(PLACE)
    with pytest.raises(DataError, match="each of its 1 objects belongs to several"):
        reverse(relation("same", ("a", "x"), ("b", "x")), templates=["{} is of"])


# --- MQuAKE ---


def record(subject: str, bridge: str, answer: str, *, ids: tuple[str, str] = ("P17", "P36")) -> dict[str, Any]:
    """A record as the dataset has it, edits included."""
    labels = [[subject, "country", bridge], [bridge, "capital", answer]]
    return {
        "case_id": 1,
        "requested_rewrite": [{"prompt": "{} is in", "subject": subject, "target_new": {"str": "Mali", "id": "Q912"}}],
        "questions": [f"What is the capital of the country of {subject}?", f"Which capital has {subject}'s country?"],
        "answer": answer,
        "answer_alias": [],
        "single_hops": [
            {"question": f"Where is {subject}?", "cloze": f"{subject} is in", "answer": bridge, "answer_alias": []},
            {"question": f"Capital of {bridge}?", "cloze": f"The capital of {bridge} is", "answer": answer},
        ],
        "orig": {
            "triples": [[f"Q{subject}", ids[0], f"Q{bridge}"], [f"Q{bridge}", ids[1], f"Q{answer}"]],
            "triples_labeled": labels,
            "edit_triples": [],
        },
    }


def write(folder: Any, content: Any) -> Any:
    path = folder / "mquake.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_records_of_the_same_relations_become_a_composition(tmp_path):
    longer = record("Louvre", "France", "Paris")
    longer["orig"]["triples"].append(["QParis", "P1", "Q1"])
    content = [
        record("Louvre", "France", "Paris"),
        record("Kreml", "Russia", "Moscow"),
        record("Louvre", "France", "Paris"),  # the same chain with other edits
        record("Kreml", "Mongolia", "Ulaanbaatar"),  # a second bridge for a subject
        record("Rome Opera", "Italy", "Rome"),  # can be copied
        record("Tate", "Britain", "London", ids=("P17", "P1376")),  # alone with its relations
        longer,
    ]
    (found,) = load_mquake(write(tmp_path, content))
    assert found.chains == (Chain("Louvre", "France", "Paris"), Chain("Kreml", "Russia", "Moscow"))
    assert found.counts == {
        "records": 5,
        "words without their subject": 0,
        "second bridge or object": 1,
        "same chain again": 1,
        "object is the bridge": 0,
        "object in the subject": 1,
        "bridge in the subject": 0,
    }
    assert found.first.prompt_templates_zs == ("{} is in",)
    assert found.second.prompt_templates_zs == ("The capital of {} is",)
    assert found.wordings[0].template == "Q: What is the capital of the country of {}? A:"
    assert found.wordings[1].relation_alone == "Q: Which capital has country? A:"
    assert [one.name for one in load_mquake(write(tmp_path, content), least=1)] == ["country__capital"] * 2


def test_the_commonest_words_of_a_relation_come_first(tmp_path):
    content = [record(f"thing{i}", f"land{i}", f"town{i}") for i in range(3)]
    content[0]["single_hops"][0]["cloze"] = "thing0 lies in"
    content[2]["single_hops"][1]["cloze"] = "No name here"
    (found,) = load_mquake(write(tmp_path, content))
    assert found.first.prompt_templates_zs == ("{} lies in", "{} is in") and len(found.chains) == 2
    assert found.counts["words without their subject"] == 1


def damaged(*path: Any, value: Any) -> Any:
    """A good record that has something else in one place, or nothing."""
    content = [record("Kreml", "Russia", "Moscow")]
    place: Any = content[0]
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "expected a list of records"),
        ([], "expected a list of records"),
        (["x"], "record 0: 'orig' is missing"),
        (damaged("orig", value=KeyError), "record 0: 'orig' is missing"),
        (damaged("orig", "triples_labeled", value=KeyError), "'orig.triples_labeled' is missing"),
        (damaged("orig", "triples", value="x"), "must be lists"),
        (damaged("orig", "triples", value=[["a"], ["b"]]), "orig.triples: expected as many triples"),
        (damaged("orig", "triples_labeled", value=[["a", "b", "c"]]), "expected as many triples"),
        (damaged("orig", "triples_labeled", 0, 2, value="Peru"), "does not begin where the first one ends"),
        (damaged("single_hops", value=[]), "expected one per triple"),
        (damaged("single_hops", 1, "cloze", value=KeyError), r"single_hops\[1\]: 'cloze' is missing"),
        (damaged("single_hops", 1, value=7), r"single_hops\[1\]: 'cloze' is missing"),
        (damaged("questions", value=[3]), "texts that are not empty"),
        (damaged("questions", value=[""]), "texts that are not empty"),
        (damaged("questions", value=None), "must be lists"),
        ([record("Rome Opera", "Italy", "Rome")] * 2, "of 2 records 2 have two hops, of 1 pairs"),
    ],
)
def test_a_file_that_is_not_mquakes_is_refused_where_it_is_wrong(tmp_path, content, said):
    before = copy.deepcopy(content)
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=said) as caught:
        load_mquake(path)
    assert str(path) in str(caught.value) and content == before


def test_records_that_are_something_else_are_left_out_and_named(tmp_path):
    good = [record("Louvre", "France", "Paris"), record("Kreml", "Russia", "Moscow")]
    path = write(tmp_path, [good[0], {"orig": 1}, good[1], None])
    with pytest.warns(UserWarning, match=r"2 of 4 records cannot be read: .*record 1: .*record 3: "):
        (found,) = load_mquake(path)
    assert found.chains == load_mquake(write(tmp_path, good))[0].chains


@pytest.mark.parametrize("text", [b"", b"[{", b"\xff\xfe", b"[" * 100_000, b'[{"orig": "' + b"x" * 9])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=re.escape(str(path))):
        load_mquake(path)
    with pytest.raises(DataError, match="There is no file"):
        load_mquake(tmp_path / "nothing.json")
