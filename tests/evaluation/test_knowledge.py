"""The table of what a model knows, against asking the Hugging Face model fact by fact."""

from __future__ import annotations

import pytest

from kcwb.errors import SettingError
from kcwb.evaluation.knowledge import knowledge_table
from kcwb.tasks.relations import Fact, Relation, load_relations
from tests.tasks import answer_ids, slow_rank, unpadded_logits


def rank_alone(model, fact, template) -> int:
    """The rank of an answer's first token in the Hugging Face model's own logits for one prompt."""
    logits = unpadded_logits(model, fact, template)[0]
    return int((logits >= logits[answer_ids(model, fact)[0]]).sum())


def test_hits_are_those_of_the_model_asked_fact_by_fact(tiny, words):
    model = tiny("llama")
    table = knowledge_table(model, [words], template=1, progress=False)
    template = words.prompt_templates_zs[1]
    ranks = [rank_alone(model, fact, template) for fact in words.facts]
    row = table.iloc[0]
    assert (row["relation"], row["category"], row["template"]) == ("words", "factual", template)
    assert row["facts"] == len(ranks) and 0 < sum(rank <= 10 for rank in ranks) < len(ranks)
    assert row["hit_10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / len(ranks))
    assert row["hit_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks))


def test_answers_counts_different_first_tokens(tiny):
    """Objects that start alike count once."""
    facts = (Fact("w1", "w7 w8"), Fact("w2", "w7 w9"), Fact("w3", "w5"), Fact("w4", "w5"))
    relation = Relation("few", "bias", "word", "word", False, ("{} w80",), ("{} w80",), facts)
    assert knowledge_table(tiny("llama"), [relation], progress=False).loc[0, "answers"] == 2


def test_hits_and_shares_where_objects_begin_alike(tiny):
    """w42 begins another object, so that no token tells whether it is meant; the shares are of the other facts."""
    model, objects = tiny("llama"), ["w40 w1", "w40 w2", "w41", "w42", "w42 w7", "w43 w8"]
    facts = tuple(Fact(f"w{10 + i}", objects[i % 6]) for i in range(24))
    relation = Relation("alike", "bias", "word", "word", False, ("{} w80",), ("{} w80",), facts)
    with pytest.warns(UserWarning, match=r"4 of 24 facts of alike .*'w42'"):
        row = knowledge_table(model, [relation], progress=False).iloc[0]
    ranks = [slow_rank(model, fact, objects, "{} w80") for fact in facts if fact.object != "w42"]
    assert (row["facts"], row["answers"]) == (20, 4) and row["first_tells"] == pytest.approx(2 / 6)
    assert row["hit_10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / 20)
    assert row["hit_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / 20)


def test_a_sample_is_drawn_by_seed_and_never_larger_than_the_relation(tiny, words):
    model = tiny("llama")
    some = [knowledge_table(model, [words], n=5, seed=seed, progress=False) for seed in (0, 0, 1, 2)]
    assert some[0].equals(some[1]) and some[0].loc[0, "facts"] == 5
    assert knowledge_table(model, [words], n=500, progress=False).loc[0, "facts"] == len(words.facts)


def test_rows_keep_the_order_and_progress_counts_facts(tiny, words):
    other = Relation("other", "bias", "word", "word", False, ("{} w80",), ("{} w80",), words.facts[:3])
    reports = []
    table = knowledge_table(
        tiny("llama"), [other, words], n=4, progress=lambda done, total, note: reports.append((done, total, note))
    )
    assert list(table["relation"]) == ["other", "words"]
    assert reports == [(3, 7, "other"), (7, 7, "words")]


@pytest.mark.parametrize(("settings", "words_of_error"), [({"n": 0}, "n=0"), ({"template": 3}, "has 3 zero-shot")])
def test_settings_that_cannot_be_meant(tiny, words, settings, words_of_error):
    with pytest.raises(SettingError, match=words_of_error):
        knowledge_table(tiny("llama"), [words], progress=False, **settings)


@pytest.mark.model
def test_the_built_in_model_knows_capitals_better_than_superheroes(smollm2):
    relations = [r for r in load_relations() if r.name in ("country_capital", "superhero_person")]
    table = knowledge_table(smollm2, relations, n=20, progress=False).set_index("relation")
    assert table.loc["country_capital", "hit_10"] > 0.6 > 0.4 > table.loc["superhero_person", "hit_10"]
