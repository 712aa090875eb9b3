"""Relations: read, validated with file and place, written; and every file that comes with the package."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from kcwb.errors import DataError
from kcwb.tasks.relations import (
    Fact,
    Relation,
    load_relation,
    load_relations,
    relation_files,
)

LRE = {
    "name": "country capital city",
    "prompt_templates": ["The capital of {} is", "{}'s capital is"],
    "prompt_templates_zs": ["What is the capital of {}? It is"],
    "properties": {
        "relation_type": "factual",
        "domain_name": "country",
        "range_name": "city",
        "symmetric": False,
    },
    "samples": [
        {"subject": "France", "object": "Paris"},
        {"subject": "Åland", "object": "Mariehamn"},
        {"subject": "Japan", "object": "Tokyo"},
    ],
}


@pytest.fixture
def write(tmp_path):
    """Write JSON, text or bytes to a file of its own."""

    def write(data, name="relation.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, dict | list):
            data = json.dumps(data, ensure_ascii=False)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def changed(place: str, value) -> dict:
    """The LRE example with the value at a place such as `samples.1.object` replaced; `...` removes it."""
    data = copy.deepcopy(LRE)
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner = data
    for part in parents:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


# Reading and writing


def test_a_file_becomes_a_relation(write):
    relation = load_relation(write(LRE))
    assert relation == Relation(
        name="country capital city",
        relation_type="factual",
        domain_name="country",
        range_name="city",
        symmetric=False,
        prompt_templates=("The capital of {} is", "{}'s capital is"),
        prompt_templates_zs=("What is the capital of {}? It is",),
        facts=(Fact("France", "Paris"), Fact("Åland", "Mariehamn"), Fact("Japan", "Tokyo")),
    )


def test_a_file_of_the_public_dataset_with_more_keys_loads(write):
    data = copy.deepcopy(LRE)
    data["_comment"] = {"from": "elsewhere"}
    data["properties"] |= {"fn_type": "MANY_TO_ONE", "disambiguating": True}
    data["samples"][0] |= {"subject_aliases": ["La France"]}
    assert load_relation(write(data)) == load_relation(write(LRE, "plain.json"))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_path_may_be_text_or_path(write, as_text):
    path = write(LRE)
    assert load_relation(str(path) if as_text else path).name == "country capital city"


def test_saving_and_loading_gives_the_same_relation(write, tmp_path):
    relation = load_relation(write(LRE))
    odd = replace(relation, symmetric=True, facts=(Fact('a "quoted" \\ word', "<b>&amp;"), Fact("日本", "東京\u2028x")))
    for one in (relation, odd):
        one.save(tmp_path / "saved.json")
        assert load_relation(tmp_path / "saved.json") == one


def test_a_saved_file_keeps_to_the_layout_with_one_sample_a_line(write):
    relation = load_relation(write(LRE))
    text = relation.to_json()
    assert json.loads(text) == LRE
    assert '{"subject": "Åland", "object": "Mariehamn"}' in [line.strip().rstrip(",") for line in text.splitlines()]


def test_the_digest_depends_on_the_content_and_not_on_the_layout(write):
    relation = load_relation(write(LRE))
    assert load_relation(write(json.dumps(LRE, indent=7, sort_keys=True), "other.json")).digest == relation.digest
    others = [changed("name", "x"), changed("properties.symmetric", True), changed("samples.0.object", "Lyon")]
    digests = [load_relation(write(data, f"{i}.json")).digest for i, data in enumerate(others)]
    assert len({relation.digest, *digests}) == 4


def test_objects_are_the_different_ones_in_order(write):
    facts = [{"subject": s, "object": o} for s, o in ["ab", "cd", "eb", "fa"]]
    assert load_relation(write(changed("samples", facts))).objects == ("b", "d", "a")


def test_identical_duplicates_collapse(write):
    data = changed("samples", [LRE["samples"][0], LRE["samples"][1], LRE["samples"][0]])
    assert load_relation(write(data)).facts == (Fact("France", "Paris"), Fact("Åland", "Mariehamn"))


# Malformed files

MALFORMED = [
    *[
        (f"without {place}", changed(place, ...), place.rpartition(".")[2])
        for place in ("name", "prompt_templates", "prompt_templates_zs", "properties", "samples")
    ],
    *[
        (f"without properties.{key}", changed(f"properties.{key}", ...), f"properties.{key}")
        for key in ("relation_type", "domain_name", "range_name", "symmetric")
    ],
    ("without a sample's object", changed("samples.1.object", ...), "samples[1].object"),
    ("without a sample's subject", changed("samples.2.subject", ...), "samples[2].subject"),
    ("no {}", changed("prompt_templates_zs.0", "The capital is"), "prompt_templates_zs[0]"),
    ("{} twice", changed("prompt_templates.1", "{} or {}"), "prompt_templates[1]"),
    ("template ends in a space", changed("prompt_templates.1", "{} is "), "prompt_templates[1]"),
    ("template ends in a line break", changed("prompt_templates_zs.0", "{} is\n"), "prompt_templates_zs[0]"),
    ("empty template", changed("prompt_templates.0", ""), "prompt_templates[0]"),
    ("template is a number", changed("prompt_templates.0", 7), "prompt_templates[0]"),
    ("no templates", changed("prompt_templates", []), "prompt_templates"),
    ("no zero-shot templates", changed("prompt_templates_zs", []), "prompt_templates_zs"),
    ("templates are a text", changed("prompt_templates", "{} is"), "prompt_templates"),
    ("empty samples", changed("samples", []), "samples"),
    ("samples are an object", changed("samples", {"France": "Paris"}), "samples"),
    ("a sample is a text", changed("samples.1", "Japan"), "samples[1]"),
    ("a sample is null", changed("samples.1", None), "samples[1]"),
    ("empty subject", changed("samples.1.subject", ""), "samples[1].subject"),
    ("blank object", changed("samples.1.object", " \t"), "samples[1].object"),
    ("subject is a number", changed("samples.0.subject", 1984), "samples[0].subject"),
    ("object is a list", changed("samples.2.object", ["Tokyo"]), "samples[2].object"),
    ("object is null", changed("samples.2.object", None), "samples[2].object"),
    ("name is empty", changed("name", ""), "name"),
    ("name is a number", changed("name", 3), "name"),
    ("symmetric is a text", changed("properties.symmetric", "no"), "properties.symmetric"),
    ("symmetric is a number", changed("properties.symmetric", 0), "properties.symmetric"),
    ("relation_type is null", changed("properties.relation_type", None), "properties.relation_type"),
    ("properties are a list", changed("properties", []), "properties"),
    ("a list", [LRE], "top level"),
    ("a lone surrogate", json.dumps(changed("samples.1.subject", "\ud800")), "samples[1].subject"),
]


@pytest.mark.parametrize(("data", "place"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_a_malformed_file_is_an_error_with_file_and_place(write, data, place):
    path = write(data, "broken.json")
    with pytest.raises(DataError) as caught:
        load_relation(path)
    message = str(caught.value)
    assert str(path) in message
    # the place itself, not a part of a longer one
    assert re.search(rf"(?<![\w.]){re.escape(place)}(?![\w.\[])", message.replace(str(path), "")), message


def test_of_several_objects_of_a_subject_the_first_counts_and_the_others_are_counted(write):
    data = copy.deepcopy(LRE)
    data["samples"] += [{"subject": "France", "object": "Lyon"}, {"subject": " France", "object": "Nice"}]
    path = write(data)
    with pytest.warns(UserWarning, match=r"2 of 5 facts .*'France': 'Lyon' \(kept: 'Paris'\)") as caught:
        relation = load_relation(path)
    assert str(path) in str(caught[0].message)
    assert relation.facts == load_relation(write(LRE, "plain.json")).facts


def test_white_space_around_subjects_and_objects_is_not_theirs(write):
    data = changed("samples.0", {"subject": "France ", "object": "\tParis\n"})
    assert load_relation(write(data)) == load_relation(write(LRE, "plain.json"))


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    text = "\ufeff" + json.dumps(LRE)
    assert load_relation(write(text)) == load_relation(write(LRE, "plain.json"))


def test_text_that_is_not_utf8_is_an_error_with_the_byte(write):
    path = write(json.dumps(LRE, ensure_ascii=False).replace("Å", "A").encode().replace(b"Aland", b"\xc5land"))
    with pytest.raises(DataError, match=rf"UTF-8.*byte {path.read_bytes().index(0xC5)} is 0xc5") as caught:
        load_relation(path)
    assert str(path) in str(caught.value)


def test_text_that_is_not_json_is_an_error_with_line_and_column(write):
    path = write('{"name": "x",\n "samples": [1,, 2]}')
    with pytest.raises(DataError, match=r"line 2, column 16.*not JSON") as caught:
        load_relation(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "\ufeff{}", "[" * 100_000, '{"name": ' + "9" * 5000 + "}", "NaN"],
    ids=["empty", "byte order mark", "nested without end", "number without end", "not a number"],
)
def test_hostile_text_is_an_error_with_the_file(write, text):
    path = write(text)
    with pytest.raises(DataError) as caught:
        load_relation(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_a_missing_file_is_an_error_with_its_path(tmp_path):
    with pytest.raises(DataError, match=r"no file .*nowhere\.json"):
        load_relation(tmp_path / "nowhere.json")


def test_a_folder_named_as_a_file_is_an_error_with_its_path(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder\.json cannot be read"):
        load_relation(tmp_path / "folder.json")


@pytest.mark.parametrize("name", ["country_captial", "country-capital", "capital"])
def test_an_unknown_name_suggests_the_nearest(name):
    with pytest.raises(DataError, match=rf"no relation '{name}'.*Did you mean.*'country_capital'"):
        load_relation(name)


def test_a_name_near_to_none_lists_them_all():
    with pytest.raises(DataError) as caught:
        load_relation("zzzzzz")
    assert all(name in str(caught.value) for name in relation_files())


# Folders


def test_a_folder_loads_by_category_and_name(write, tmp_path):
    for name in ("b/two.json", "a/three.json", "a/one.json"):
        write(changed("name", name.partition("/")[2]), name)
    write("not a relation", "a/notes.txt")
    assert [relation.name for relation in load_relations(tmp_path)] == ["one.json", "three.json", "two.json"]


def test_a_folder_loads_what_it_can_and_names_the_rest(write, tmp_path):
    write(LRE, "a/good.json")
    write(changed("samples", []), "a/empty.json")
    write("{", "b/cut.json")
    with pytest.warns(UserWarning, match=r"2 of 3 relations cannot be read: .*empty\.json.*cut\.json"):
        relations = load_relations(tmp_path)
    assert [relation.name for relation in relations] == [LRE["name"]]


def test_a_folder_of_which_nothing_can_be_read_is_an_error_with_every_reason(write, tmp_path):
    first, second = write("{", "a/cut.json"), write("[]", "b/list.json")
    with pytest.raises(DataError) as caught:
        load_relations(tmp_path)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_two_files_of_one_name_in_a_folder_are_an_error_with_both(write, tmp_path):
    first, second = write(LRE, "a/same.json"), write(LRE, "b/same.json")
    with pytest.raises(DataError, match="'same'") as caught:
        load_relations(tmp_path)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_a_missing_folder_is_an_error_with_its_path(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_relations(tmp_path / "nowhere")


# The files that come with the package

CATEGORIES = {"factual": 12, "commonsense": 5, "linguistic": 5, "bias": 2}
#: Relations with fewer than 30 facts, and why the world has no more.
FEWER_FACTS: dict[str, str] = {}
#: Relations whose object is found in its subject when case is ignored, and why that gives nothing away.
WITHIN_BUT_FOR_CASE = {
    "element_symbol": "hydrogen, H: the symbol is a capital letter of its own",
    "word_first_letter": "apple, A: the letter is what is asked for",
}
FILES = relation_files()


def test_there_are_enough_relations_in_every_category():
    counts = Counter(path.parent.name for path in FILES.values())
    assert set(counts) == set(CATEGORIES)
    for category, least in CATEGORIES.items():
        assert counts[category] >= least
    assert counts.total() >= 24


def test_exceptions_are_of_relations_that_are_there_and_needed():
    assert set(WITHIN_BUT_FOR_CASE) <= set(FILES)
    assert all(len(load_relation(name).facts) < 30 for name in FEWER_FACTS)


@pytest.mark.parametrize("stem", FILES)
def test_every_relation_of_the_package_is_valid(stem):
    path = FILES[stem]
    relation = load_relation(stem)
    assert relation.name == stem and relation.relation_type == path.parent.name
    assert len(relation.facts) >= 30 or stem in FEWER_FACTS
    assert len(set(relation.prompt_templates_zs)) >= 3
    assert len(relation.objects) >= 2
    for template in relation.prompt_templates + relation.prompt_templates_zs:
        assert template[-1].isalnum() or template.endswith("{}"), f"{template!r} does not lead on to a word"


@pytest.mark.parametrize("stem", FILES)
def test_no_fact_of_the_package_is_given_twice(stem):
    samples = json.loads(FILES[stem].read_text(encoding="utf-8"))["samples"]  # the loader would drop a duplicate
    subjects = Counter(sample["subject"].casefold() for sample in samples)
    assert [subject for subject, count in subjects.items() if count > 1] == []


@pytest.mark.parametrize("stem", FILES)
def test_no_subject_of_the_package_gives_its_object_away(stem):
    facts = load_relation(stem).facts
    assert [fact for fact in facts if fact.object in fact.subject] == []
    if stem not in WITHIN_BUT_FOR_CASE:
        assert [fact for fact in facts if fact.object.casefold() in fact.subject.casefold()] == []


@pytest.mark.parametrize("stem", FILES)
def test_one_object_is_spelt_one_way(stem):
    objects = load_relation(stem).objects
    assert len({name.casefold() for name in objects}) == len(objects)
