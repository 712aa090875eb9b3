"""Facts are asked both ways, and counted."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from kcwb.errors import SettingError
from kcwb.studies.two_hop.backwards import both_ways, reversal
from kcwb.tasks.compose import reverse
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from tests.tasks import relation_of, slow_rank
from tests.tasks.test_hops import rank


def test_a_fact_is_asked_both_ways(tiny):
    model = tiny("llama")
    facts = [Fact(f"w{i}", f"w{40 + max(i, 2)}") for i in range(9)]  # three subjects have w42
    forward = relation_of(facts, "w1 {} w2")
    found = both_ways(
        model, forward, reverse(forward, templates=["w3 {}", "w4 {} w5"]), back_template=1, progress=False
    )
    assert found["subject"].tolist() == [f"w{i}" for i in range(3, 9)]
    for row in found.itertuples():
        assert row.forward == rank(model, f"w1 {row.subject} w2", row.object)
        assert row.backward == rank(model, f"w4 {row.object} w5", row.subject)


def test_answers_both_ways_are_told_apart_from_all_objects(tiny):
    model = tiny("llama")
    facts = [Fact("w1", "w40 w1"), Fact("w2", "w40 w2"), Fact("w3", "w41"), Fact("w4", "w40 w2"), Fact("w5", "w42")]
    found = both_ways(
        model, relation_of(facts, "w1 {} w2"), reverse(relation_of(facts), templates=["w4 {} w5"]), progress=False
    )
    assert found["subject"].tolist() == ["w1", "w3", "w5"]  # w40 w2 has two subjects
    for row in found.itertuples():
        fact = Fact(row.subject, row.object)
        assert row.forward == slow_rank(model, fact, ["w40 w1", "w40 w2", "w41", "w42"], "w1 {} w2")


def test_an_object_that_is_right_for_two_subjects_is_not_asked_backwards(tiny):
    model = tiny("llama")
    facts = [Fact("w1", "w40", also=("w41",)), Fact("w2", "w41"), Fact("w3", "w42", space=False)]
    back = reverse(relation_of(facts), templates=["w4 {} w5"])
    assert back.facts == (Fact("w40", "w1"), Fact("w42", "w3", space=False))
    found = both_ways(model, relation_of(facts[:2], "w1 {} w2"), replace(back, facts=back.facts[:1]), progress=False)
    assert found["forward"].tolist() == encode(model, facts[:1], "w1 {} w2", ["w40", "w41"]).ranks.tolist()


def test_reversal_counts_by_hand():
    table = pd.DataFrame({"forward": [1, 1, 1, 1, 1, 2, 9, 1], "backward": [1, 5, 5, 5, 5, 1, 9, 5]})
    found = reversal(table).set_index("asked")
    assert found["known"].tolist() == [6, 2, 1, 1, 1] and found["of"].tolist() == [8, 8, 8, 6, 2]
    # of the six that are known one way only, five are known forward: 2 (6 + 1) / 2^6
    assert found.loc["forward", "p"] == pytest.approx(2 * 7 / 64) and found["p"].isna().sum() == 4
    assert (found["low"] <= found["share"]).all() and (found["share"] <= found["high"]).all()
    none = reversal(pd.DataFrame({"forward": [2], "backward": [2]}))
    assert none.loc[0, "p"] == 1.0 and none["share"].isna().sum() == 2
    with pytest.raises(SettingError):
        reversal(table, k=0)
