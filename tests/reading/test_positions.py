"""Instruments that read an answer's first token keep the facts that it tells apart, and refuse where it never does."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pandas as pd
import pytest

from kcwb.errors import DataError
from kcwb.interventions.role_tests import check_roles
from kcwb.reading.dla import dla_by_source
from kcwb.reading.lens import arrival, lens
from kcwb.reading.nodes import component_logits
from kcwb.reading.positions import rows_told_at_end, token_text
from kcwb.reading.roles import head_roles
from kcwb.studies.hallucination.diagnosis import diagnose
from kcwb.studies.hallucination.measurement import measure_answers, task_of
from kcwb.studies.hallucination.rescue import rescue
from kcwb.studies.in_context.ablation import ablate_new
from kcwb.studies.two_hop.lens import hop_lens
from kcwb.tasks.compose import compose
from kcwb.tasks.demonstrations import Context
from kcwb.tasks.hops import ask_hops, make_hops
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.shots import ShotTask

TEMPLATES = ("w80 {} w81 w82", "w84 {} w83")
#: As years begin with their century, all objects begin alike; and three more that do not.
ALIKE, APART = tuple(f"w40 w{i}" for i in range(1, 7)), ("w50", "w51 w1", "w52")
ONE_HEAD = pd.DataFrame([("a0.h0", 0, 0, "mover")], columns=["node", "layer", "head", "role"])


def relation_of(objects, name="alike") -> Relation:
    facts = tuple(Fact(f"w{10 + i}", objects[i % len(objects)]) for i in range(18))
    return Relation(name, "factual", "word", "word", False, TEMPLATES, TEMPLATES, facts)


def task_with(model, objects):
    relation = relation_of(objects)
    prompts = encode(model, relation.facts, TEMPLATES[0], relation.objects)
    return task_of(model, relation, TEMPLATES[0], prompts, range(len(prompts)), 0)


def shots_with(model, objects):
    task = task_with(model, objects)
    more = {"k": 0, "kind": "shots", "question": TEMPLATES[0], "contexts": (Context(""),)}
    return ShotTask(**{**vars(task), "test": task.val}, **more)


def hops_with(model, objects):
    """Two-hop chains whose bridges begin alike, or not."""
    first = relation_of(objects, "first")
    facts = tuple(Fact(name, f"w{60 + i}") for i, name in enumerate(objects))
    second = replace(first, name="second", facts=facts)
    chains = compose(first, second, wordings=[("w70 {}", "{} w71")])
    return make_hops(ask_hops(model, chains, progress=False), k=10**9, shortcut_k=None, n=18)


INSTRUMENTS = {
    "lens": lambda model, some: lens(model, task_with(model, some), progress=False),
    "arrival": lambda model, some: arrival(model, task_with(model, some), progress=False),
    "head_roles": lambda model, some: head_roles(
        model, None, task_with(model, some), shuffles=20, resamples=1, progress=False
    ),
    "check_roles": lambda model, some: check_roles(
        model, ONE_HEAD, task_with(model, some), random_heads=19, draws=20, progress=False
    ),
    "dla_by_source": lambda model, some: dla_by_source(model, task_with(model, some).val, ["a0.h0"]),
    "ablate_new": lambda model, some: ablate_new(
        model, shots_with(model, some), ["a0.h0"], draws=2, progress=False
    ),
    "hop_lens": lambda model, some: hop_lens(model, hops_with(model, some), progress=False),
    "rescue": lambda model, some: rescue(
        model, [relation_of(some)], movers=["a0.h0"], n=18, draws=20, progress=False
    ),
    "measure_answers": lambda model, some: measure_answers(
        model, [relation_of(some, name) for name in "abc"], n=18, progress=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_objects_that_all_begin_alike_are_refused_with_the_share(tiny, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            DataError, match=r"18 of 18 facts .*same token as another object.*'w40 w1'.*No fact is left"
        ):
            INSTRUMENTS[name](tiny("llama"), ALIKE)


@pytest.mark.parametrize(
    "name", ["lens", "arrival", "head_roles", "check_roles", "dla_by_source", "ablate_new", "hop_lens"]
)
def test_facts_that_the_first_token_does_not_tell_apart_are_left_out_with_their_number(tiny, name):
    with pytest.warns(UserWarning, match=r"12 of 18 facts .*same token as another object.*'w40 w1'.*: left out"):
        found = INSTRUMENTS[name](tiny("llama"), (*ALIKE, *APART))
    table = found.every if name == "check_roles" else found
    if "facts" in table:
        assert set(table["facts"]) == {6}
    if name in ("arrival", "dla_by_source"):
        assert set(table["object"]) == set(APART)
    if name == "hop_lens":
        assert set(table["bridge"]) == set(APART)


def test_one_fact_is_diagnosed_if_its_own_token_tells_it_apart(tiny):
    model, relation = tiny("llama"), relation_of((*ALIKE, *APART))
    with pytest.raises(DataError, match="1 of 1 facts"):
        diagnose(model, relation, "w10", movers=["a0.h0"], progress=False)
    assert diagnose(model, relation, "w16", movers=["a0.h0"], progress=False).gold.strip() == "w50"


def test_rows_count_where_each_of_their_prompts_is_told_apart(tiny):
    model = tiny("llama")
    one, other = (
        encode(model, facts, TEMPLATES[0], [fact.object for fact in facts])
        for facts in (
            [Fact("w10", "w40 w1"), Fact("w11", "w40 w2"), Fact("w12", "w50"), Fact("w13", "w51")],
            [Fact("w10", "w60"), Fact("w11", "w61"), Fact("w12", "w62 w1"), Fact("w13", "w63")],
        )
    )
    assert rows_told_at_end(other) == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match=r"2 of 4 facts .*'w40 w1', 'w40 w2'"):
        assert rows_told_at_end(one, other) == rows_told_at_end(other, one) == [2, 3]


def test_a_token_that_several_objects_begin_with_is_not_marked_as_an_answer(tiny):
    model = tiny("llama")
    task = task_with(model, (*ALIKE, *APART))
    table = component_logits(model, task, "m1", k=model.network.d_vocab)
    assert set(table.loc[table["answer"], "token"].str.strip()) == {"w50", "w51", "w52"}
    assert not component_logits(model, task, "m1", prompt=0, k=5)["answer"].any()


def test_a_tokens_text_can_be_shown_and_sent_whatever_it_is(tiny, monkeypatch):
    model = tiny("llama")
    assert token_text(model, model.tokenizer("w7")["input_ids"][-1]) == "w7"
    for decoded, expected in {"a\0b": "a\ufffdb", "\ud800": "?", "<b>": "<b>"}.items():
        monkeypatch.setattr(type(model.tokenizer), "decode", lambda self, ids, decoded=decoded: decoded)
        assert token_text(model, 5) == expected
