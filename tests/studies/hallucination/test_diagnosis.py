"""A diagnosis equals the lens and the attributions of single prompts, and hand-written heads are found by it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pandas as pd
import pytest

from kcwb.errors import CircuitError, DataError, ModelError, SettingError
from kcwb.reading.dla import dla_by_source
from kcwb.reading.lens import lens_by_fact
from kcwb.reading.trajectories import WHERE, WHO
from kcwb.studies.hallucination import diagnosis as module
from kcwb.studies.hallucination.diagnosis import Diagnosis, diagnose
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.handmade import Handmade, additive, copying_head
from tests.tasks import unpadded_logits


@cache
def copying() -> Handmade:
    return copying_head()


@cache
def made(subject: str, obj: str) -> Diagnosis:
    return diagnose(copying().model, copying().relation, Fact(subject, obj), progress=False)


# --- one fact ---


def test_the_hand_written_mover_is_named_and_moves_what_it_was_written_to_move():
    found = made("s1", "o1")
    assert found.right and found.failure == "none" and found.gold == "o1"
    assert found.movers["node"].tolist() == ["a1.h2"]
    mover = found.movers.iloc[0]
    assert mover["gold"] > 4 > 1 > mover["rival"] and mover["source"] == "s1" and mover["attention_source"] > 0.9
    assert mover["writes"].split(" | ")[0] == "o1"
    assert found.heads["node"].iloc[-1] == "a1.h2"  # none speaks less for the rival


def test_for_a_wrong_answer_the_mover_that_brings_it_stands_first():
    found = made("s1", "o5")
    assert not found.right and (found.gold, found.rival) == ("o5", "o1")
    assert found.heads["node"].iloc[0] == "a1.h2" and found.heads["difference"].iloc[0] > 4
    assert found.heads["difference"].is_monotonic_decreasing
    part = found.balance.set_index("part")["difference"]
    assert part["movers"] > 0.9 * part["all"] and abs(part["other heads"]) < 0.25 * part["movers"]


def test_another_right_answer_is_no_wrong_one():
    found = diagnose(copying().model, copying().relation, Fact("s1", "o5", also=("o1",)), progress=False)
    assert found.right and found.gold == "o1" and found.rival not in ("o1", "o5")
    assert (found.gold, found.rival) == (made("s1", "o1").gold, made("s1", "o1").rival)


def test_a_failure_is_of_selection_exactly_where_the_object_was_recalled_at_the_subject():
    model, relation = copying().model, copying().relation
    seen = set()
    for obj in relation.objects:
        found = made("s1", obj)
        task = replace(
            make_task(model, relation, n=1),
            val=encode(model, [Fact("s1", obj)], relation.template(0), relation.objects),
        )
        lens = lens_by_fact(model, task, progress=False)
        recalled = (lens.loc[lens["who"] == "object, subject's tokens", "rank"] <= 10).any()
        assert found.failure == ("none" if obj == "o1" else "selection" if recalled else "enrichment")
        assert found.answers["arrives, subject's best token"].notna()[0] == recalled
        seen.add(found.failure)
    assert seen == {"none", "selection", "enrichment"}


def test_contributions_are_those_of_each_token_as_the_answer():
    model, relation, found = copying().model, copying().relation, made("s1", "o5")
    for name, obj in (("gold", "o5"), ("rival", "o1")):
        prompts = encode(model, [Fact("s1", obj)], relation.template(0), relation.objects)
        table = dla_by_source(model, prompts, found.heads["node"].tolist())
        groups = table.pivot_table(index="node", columns="group", values="contribution", aggfunc="sum")
        heads = found.heads.set_index("node").loc[groups.index]
        assert heads[name].tolist() == pytest.approx(groups.sum(axis=1).tolist(), abs=1e-5)
        assert heads[f"{name}_subject"].tolist() == pytest.approx(groups["SUBJECT"].tolist(), abs=1e-5)
        assert heads[f"{name}_relation"].tolist() == pytest.approx(groups["RELATION"].tolist(), abs=1e-5)


def test_the_balance_adds_up_to_the_models_logits():
    model, found = copying().model, made("s1", "o5")
    logits = unpadded_logits(model, found.fact, found.template)[0]
    tokens = model.tokenizer.convert_tokens_to_ids(["o5", "o1"])
    parts = found.balance[["gold", "rival"]].to_numpy()
    assert found.balance["part"].tolist() == ["movers", "other heads", "MLPs and the rest", "all"]
    assert parts[3].tolist() == pytest.approx((logits[tokens] - logits.mean()).tolist(), abs=1e-4)
    assert parts[:3].sum(0).tolist() == pytest.approx(parts[3].tolist(), abs=1e-6)
    assert parts[0].tolist() == pytest.approx(found.movers[["gold", "rival"]].to_numpy().sum(0).tolist())


def test_the_fact_itself_has_no_say_in_its_movers(monkeypatch):
    """The heads are found on facts of other subjects, right or wrong as this one may be."""
    asked = []

    def spy(model, task, most, seed):
        asked.extend(fact.subject for fact in task.val.facts)
        return ["a1.h2"]

    monkeypatch.setattr("kcwb.studies.hallucination.diagnosis.strongest_movers", spy)
    diagnose(copying().model, copying().relation, "s1", n=15, progress=False)
    assert "s1" not in asked and len(asked) == 7  # half of the other 15


def test_words_hold_the_numbers_of_the_tables():
    for obj in ("o1", "o5"):
        found = made("s1", obj)
        answers, balance = found.answers.set_index("who"), found.balance.set_index("part")
        said = "right answer" if found.right else "rival"
        assert f"(probability {answers.loc[said, 'probability']:.2f})" in found.words
        assert repr(found.prompt) in found.words and "a1.h2" in found.words and "'s1'" in found.words
        for part in ("movers", "other heads", "MLPs and the rest"):
            assert f"{balance.loc[part, 'difference']:+.2f}" in found.words
        passed, total = found.recalled
        assert total == 7 and f"Of {total} other facts that the model gets right, {passed} " in found.words
    assert "failure of" in made("s1", "o5").words and "failure of" not in made("s1", "o1").words
    assert f"has rank {made('s1', 'o5').answers['rank'].iloc[0]}" in made("s1", "o5").words


def test_named_heads_need_no_other_facts():
    relation = replace(copying().relation, facts=copying().relation.facts[:1])
    found = diagnose(copying().model, relation, "big s0", movers=["a1.h1", "a1.h2"], progress=False)
    assert found.movers["node"].tolist() == ["a1.h2", "a1.h1"] and found.recalled == (0, 0)
    assert "not known here" in found.words


def test_the_lens_table_has_every_layer_place_and_token():
    table = made("s1", "o1").lens
    assert len(table) == 3 * 2 * len(WHERE) * len(WHO) and table["layer"].min() == -1
    last = table[(table["layer"] == 1) & (table["where"] == "END") & (table["quantity"] == "rank")]
    assert last.set_index("who")["value"].to_dict() == made("s1", "o1").answers.set_index("who")["rank"].to_dict()


def test_the_same_seed_gives_the_same_diagnosis():
    model, relation = copying().model, copying().relation
    one, two = (diagnose(model, relation, "s2", seed=4, progress=False) for _ in range(2))
    pd.testing.assert_frame_equal(one.heads, two.heads)
    assert one.words == two.words


# --- what is refused ---


def test_what_cannot_be_meant_is_refused_before_the_model_runs(monkeypatch):
    model, relation = copying().model, copying().relation
    monkeypatch.setattr("kcwb.studies.hallucination.diagnosis.encode", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(SettingError, match="'s1'"):
        diagnose(model, relation, "s11 ", progress=False)
    with pytest.raises(CircuitError, match=r"a7\.h7"):
        diagnose(model, relation, "s1", movers=["a7.h7"], progress=False)
    with pytest.raises(CircuitError, match="not an attention head"):
        diagnose(model, relation, "s1", movers=["m1"], progress=False)
    with pytest.raises(SettingError, match="movers=0"):
        diagnose(model, relation, "s1", movers=0, progress=False)
    with pytest.raises(SettingError, match="n=0"):
        diagnose(model, relation, "s1", n=0, progress=False)
    with pytest.raises(SettingError, match="template=3"):
        diagnose(model, relation, "s1", template=3, progress=False)


def test_too_few_other_facts_are_counted(monkeypatch):
    model, relation = copying().model, copying().relation
    few = replace(relation, facts=relation.facts[:4])
    with pytest.raises(DataError, match=r"3 other facts.*movers="):
        diagnose(model, few, "s1", progress=False)
    with pytest.raises(DataError, match=r"knows 2 other facts.*n, "):
        diagnose(model, replace(relation, facts=relation.facts[:6]), "s1", progress=False)
    monkeypatch.setattr(module, "encode", None)
    with pytest.raises(SettingError, match=r"n=3: at least 4 other facts"):
        diagnose(model, relation, "s1", n=3, progress=False)  # before the model is asked


def test_an_object_in_its_own_subject_is_refused():
    with pytest.raises(DataError, match="copying passes for knowing"):
        diagnose(copying().model, copying().relation, Fact("big s1", "big"), progress=False)


def test_a_family_without_roles_is_refused(tiny, words):
    with pytest.raises(ModelError, match="Gemma"):
        diagnose(tiny("gemma2"), words, "w1", progress=False)


def test_it_can_be_cancelled():
    def stop(done, total, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(copying().model, copying().relation, "s1", progress=stop)


def test_four_roles_are_told_apart_in_the_balance():
    """In the additive model the suppressor writes against the answer, and the mover for it."""
    found = additive("capital")
    one = diagnose(found.model, found.relation, "s1", progress=False)
    heads = one.heads.set_index("node")
    assert one.right and heads.loc["a1.h1", "mover"] and not heads.loc["a1.h0", "mover"]
    assert heads["gold"]["a1.h1"] > 1 and heads["gold"]["a1.h0"] < -0.3
    relation = heads.loc["a1.h2", ["gold_relation", "gold_subject"]].to_numpy(dtype=float)
    assert relation[0] > 5 * abs(relation[1])


@pytest.mark.model
def test_a_wrong_capital_on_the_built_in_model(smollm2):
    found = diagnose(smollm2, "country_capital", "Australia", progress=False)
    assert found.prompt == "The capital of Australia is" and 1 <= len(found.movers) <= 10
    last = found.lens[(found.lens["layer"] == 29) & (found.lens["where"] == "END")]
    assert last.loc[(last["who"] == "rival") & (last["quantity"] == "rank"), "value"].iloc[0] == 1 + found.right
    assert found.recalled[1] > 0 and repr(found.rival.strip()) in found.words
