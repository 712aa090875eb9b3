"""Answers without heads are those of runs with their edges cut, and of the induction model without its head."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.errors import CircuitError, DataError
from kcwb.interventions.head_sets import answers_without
from kcwb.interventions.nodes import ablate_nodes
from kcwb.statistics import matched_head_sets, mean_interval, proportion_interval
from kcwb.studies.in_context.ablation import ablate_new
from kcwb.studies.in_context.attention import demonstration_attention
from kcwb.tasks.metrics import answer_ranks
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.shots import make_shots, shot_tasks
from tests import handmade as H
from tests.studies.in_context.conftest import _filler


def test_the_induction_head_carries_what_a_demonstration_says():
    """Prompts ". b e f . a e": whatever came after e comes again. The model knows nothing without a shot."""
    model = H.induction().model
    facts = tuple(Fact(letter, "f") for letter in "abcd")
    relation = Relation("after e", "handmade", "word", "word", False, (". {} e",), (". {} e",), facts)
    task = make_shots(model, relation, 1, n=2, n_test=1, unrelated=[_letters()])
    table = ablate_new(model, task, ["a1.h3"], ["a0.h1"], split="val", progress=False).set_index("arm")
    assert table.loc["intact", "hit_1"] == 1 and table.loc["new heads", "hit_1"] == 0
    assert table.loc["shared heads", "hit_1"] == 0 and table.loc["random heads", "hit_1"] == 1
    assert table.loc["new heads", "p_hit_1"] == pytest.approx(1 / 5)  # the layer has four others
    heads = demonstration_attention(model, task, split="val").set_index("node")
    assert heads["object"].to_dict()["a1.h3"] > 0.9 and heads["induction"].idxmax() in ("a1.h3", "a1.h0")


def _letters() -> Relation:
    facts = tuple(Fact(*pair) for pair in ("gh", "hg"))
    return Relation("letters", "handmade", "word", "word", False, (". {}",), (". {}",), facts)


SETS = [[], ["a1.h2"], ["a0.h0", "a1.h3"], ["a0.h1", "a0.h2", "a1.h0", "a1.h1"]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gptj", "gemma2", "opt"])
@pytest.mark.parametrize("grouped", [True, False])
def test_answers_without_heads_equal_runs_with_their_edges_cut(made, name, grouped):
    model, task = made(name)
    prompts = task.test
    ranks, losses = answers_without(model, prompts, SETS, task.context_of(prompts) if grouped else None, progress=False)
    for i, heads in enumerate(SETS):
        kept = model.graph.exists.clone()
        kept[[model.graph.sender_index(head) for head in heads]] = False
        logits = run_circuit(model, kept, prompts, make_ablation(model, None, "zero"))
        assert ranks[i].tolist() == answer_ranks(logits, prompts).tolist()
        wanted = -logits[:, 0].log_softmax(-1).gather(-1, prompts.answers[:, :1])[:, 0]
        assert np.allclose(losses[i], wanted.numpy(), atol=1e-4)


def test_small_batches_give_the_same_answers(made, monkeypatch):
    model, task = made("llama")
    groups = task.context_of(task.test)
    whole = answers_without(model, task.test, SETS, groups, progress=False)
    monkeypatch.setattr("kcwb.interventions.head_sets._ROWS", 1)
    single = answers_without(model, task.test, SETS, groups, progress=False)
    assert (whole[0] == single[0]).all() and np.allclose(whole[1], single[1], atol=1e-5)


def test_the_table_is_that_of_ablated_nodes(made):
    model, task = made("llama")
    new = ["a0.h0", "a1.h3"]
    table = ablate_new(model, task, new, draws=20, progress=False).set_index("arm")
    slow = ablate_nodes(model, None, task, new, ablation="zero", progress=False)
    slow = slow[slow["split"] == "D_test"].groupby("state")["rank"]
    for arm, state in (("intact", "before"), ("new heads", "after")):
        assert table.loc[arm, "hit_1"] == (slow.get_group(state) == 1).mean()
        assert table.loc[arm, "hit_10"] == (slow.get_group(state) <= 10).mean()
    sets = matched_head_sets(model.graph, new, 20)
    each = []
    for heads in sets:
        ranks = ablate_nodes(model, None, task, heads, ablation="zero", progress=False)
        each.append(ranks[(ranks["split"] == "D_test") & (ranks["state"] == "after")]["rank"].to_numpy() == 1)
    assert table.loc["random heads", "hit_1"] == pytest.approx(np.mean(each)) and len(sets) == 9
    harm = sum(hits.mean() <= table.loc["new heads", "hit_1"] for hits in each)
    assert table.loc["new heads", "p_hit_1"] == pytest.approx((1 + harm) / 10)
    ends = {arm: tuple(table.loc[arm, ["low", "high"]]) for arm in ("new heads", "random heads")}
    assert ends["random heads"] == pytest.approx(mean_interval(np.mean(each, axis=0)), nan_ok=True)
    assert ends["new heads"] == proportion_interval(slow.get_group("after") == 1)


def test_without_other_heads_to_draw_the_other_arms_are_still_run(made):
    model, task = made("llama")
    new = ["a0.h0", *(f"a1.h{i}" for i in range(4))]
    with pytest.warns(UserWarning, match="5 of the model's 8 heads"):
        table = ablate_new(model, task, new, ["a0.h1"], draws=3, progress=False)
    assert table["arm"].tolist() == ["intact", "new heads", "shared heads"] and table["p_nll"].isna().all()


def test_a_split_without_facts_and_what_is_no_head_are_refused(made):
    model, task = made("llama")
    empty = make_shots(model, task.relation, 1, n=4, n_test=0, unrelated=[_filler()])
    with pytest.raises(DataError, match="D_test of tiny has no facts"):
        ablate_new(model, empty, ["a0.h0"], progress=False)
    with pytest.raises(DataError, match="D_test of tiny has no facts"):
        demonstration_attention(model, empty)
    with pytest.raises(CircuitError, match="'m0' is not an attention head"):
        answers_without(model, task.test, [["m0"]], progress=False)


@pytest.mark.model
def test_the_built_in_model_without_heads_equals_its_cut_runs(smollm2):
    tasks = shot_tasks(smollm2, "country_capital", [(2, "shots")], n=2, n_test=4, sets=2)
    task = tasks[2, "shots"]
    sets = [["a5.h1", "a20.h3"], ["a23.h4"]]
    ranks, losses = answers_without(smollm2, task.test, sets, task.context_of(task.test), progress=False)
    for i, heads in enumerate(sets):
        kept = smollm2.graph.exists.clone()
        kept[[smollm2.graph.sender_index(head) for head in heads]] = False
        logits = run_circuit(smollm2, kept, task.test, make_ablation(smollm2, None, "zero"))
        wanted = -logits[:, 0].log_softmax(-1).gather(-1, task.test.answers[:, :1])[:, 0]
        assert np.allclose(losses[i], wanted.numpy(), atol=2e-3)
        assert (abs(ranks[i] - answer_ranks(logits, task.test).numpy()) <= 0.01 * ranks[i]).all()


def test_a_head_that_is_named_twice_counts_once(made):
    model, task = made("llama")
    once, twice = (ablate_new(model, task, heads, draws=5, progress=False) for heads in (["a1.h0"], ["a1.h0"] * 2))
    pd.testing.assert_frame_equal(once, twice)
