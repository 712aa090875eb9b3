"""Where a subject stands in a text, in scripts with and without spaces."""

from __future__ import annotations

import json
import unicodedata

import pytest

from kcwb.editing.edit import _with_gap
from kcwb.errors import SettingError
from kcwb.tasks.mquake import load_mquake
from kcwb.tasks.relations import Fact
from kcwb.tasks.subjects import blank, places

WHOLE = [
    ("The capital of Niger is", "Niger", "The capital of {} is"),
    ("France's capital", "France", "{}'s capital"),
    ("La capitale de l'Italie est", "Italie", "La capitale de l'{} est"),
    ("法国的首都是", "法国", "{}的首都是"),
    ("フランスの首都は", "フランス", "{}の首都は"),
    ("IBM的总部在", "IBM", "{}的总部在"),
    ("เมืองหลวงของไทยคือ", "ไทย", "เมืองหลวงของ{}คือ"),
    ("भारत की राजधानी", "भारत", "{} की राजधानी"),
    ("Guinea-Bissau lies beside Guinea", "Guinea", "Guinea-Bissau lies beside {}"),
    ("S. (x) [y]", "S. (x)", "{} [y]"),
    ("by J. R. R. Tolkien is", "J. R. R. Tolkien", "by {} is"),
]
INSIDE = [
    ("Nigeria", "Niger"),
    ("The article was made by", "art"),
    ("naïve", "na"),
    (unicodedata.normalize("NFD", "café"), "cafe"),
    ("Московский", "Моск"),
    ("भारतीय", "भारत"),
    ("नि", "न"),
    ("フランスパン", "フランス"),
    ("프랑스의", "프랑스"),
    ("Area 51", "5"),
    ("A2", "A"),
    ("Guinea-Bissau", "Bissau"),
]


@pytest.mark.parametrize(("text", "subject", "template"), WHOLE)
def test_a_subject_is_found_as_whole_words(text, subject, template):
    assert blank(text, subject) == template
    assert [text[at : at + len(subject)] for at in places(text, subject)] == [subject]


@pytest.mark.parametrize(("text", "subject"), INSIDE)
def test_a_subject_inside_a_word_is_not_found(text, subject):
    assert places(text, subject) == [] and blank(text, subject) is None


def test_a_subject_that_stands_twice_leaves_open_which_is_meant():
    text = "Nigeria is not Niger. The capital of Niger is"
    assert places(text, "Niger") == [15, 37] and blank(text, "Niger") is None


@pytest.mark.parametrize("text", ["Nigeria is large", "Nigeria is not Niger. The capital of Niger is", "no such name"])
def test_an_edit_is_refused_where_its_subject_does_not_stand_once_as_whole_words(text):
    with pytest.raises(SettingError, match=r"'Niger' stands \d times as whole words"):
        _with_gap(Fact("Niger", "Niamey"), text)


def test_an_edit_takes_the_whole_word_and_not_the_longer_one_before_it():
    assert _with_gap(Fact("Niger", "Niamey"), "Beside Nigeria, the capital of Niger is").endswith(
        "the capital of {} is"
    )


def test_two_hops_whose_words_hold_the_subject_only_inside_another_are_left_out(tmp_path):
    def record(subject, bridge, cloze):
        triples = [["Q1", "P1", "Q2"], ["Q2", "P2", "Q3"]]
        labels = [[subject, "maker", bridge], [bridge, "seat", f"{bridge}ville"]]
        hops = [{"cloze": cloze}, {"cloze": f"The seat of {bridge} is"}]
        questions = [f"Where is the maker of {subject} seated?"]
        orig = {"triples": triples, "triples_labeled": labels}
        return {"orig": orig, "single_hops": hops, "questions": questions}

    records = [
        record("Lamp", "Acme", "The Lamp was made by"),
        record("Desk", "Bolt", "The Desk was made by"),
        record("art", "Corp", "The article was made by"),
    ]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    (found,) = load_mquake(path)
    assert {chain.subject for chain in found.chains} == {"Lamp", "Desk"}
    assert found.first.prompt_templates_zs == ("The {} was made by",)
