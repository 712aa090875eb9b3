"""Head roles: right on models whose heads are known, equal to slow loops, honest where there is little to go by."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.models.forward import forward
from kcwb.models.loading import load_model
from kcwb.reading.dla import attribute, final_scale, token_directions
from kcwb.reading.positions import position_groups
from kcwb.reading.roles import (
    COLUMNS,
    ROLES,
    TOO_FEW,
    head_roles,
    role_agreement,
)
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, load_relation
from kcwb.tasks.task import Task, make_task
from tests.ensembles import certain, drawn
from tests.handmade import Handmade, additive, copying_head, key_value_lookup
from tests.tiny import tiny_hf, tokenizer

MAKERS = {
    "capital": additive,
    "language": lambda: additive("language"),
    "copying": copying_head,
    "lookup": key_value_lookup,
}
#: Model -> the role of each head that was written to have one.
TRUE_ROLES = {
    "capital": {"a1.h0": "suppressor", "a1.h1": "mover", "a1.h2": "relation", "a1.h3": "mixture"},
    "language": {"a1.h0": "suppressor", "a1.h1": "mover", "a1.h2": "relation"},
    "copying": {"a1.h2": "mover"},
    "lookup": {"a2.h1": "mover"},
}


@cache
def handmade(name: str) -> tuple[Handmade, Task]:
    found = MAKERS[name]()
    return found, make_task(found.model, found.relation, n=8)


@cache
def roles_of(name: str) -> pd.DataFrame:
    found, task = handmade(name)
    return head_roles(found.model, None, task, progress=False).set_index("node")


# --- ground truth ---


@pytest.mark.parametrize("name", TRUE_ROLES)
def test_heads_that_were_written_to_have_a_role_have_it(name):
    """At all three ratios and in every resample; and no distractor writes a tenth of what the least of them writes."""
    table, true = roles_of(name), TRUE_ROLES[name]
    written = table.loc[list(true)]
    for column in ("role", "role_5", "role_3"):
        assert written[column].to_dict() == true
    assert (written["stability"] == 1).all() and (written["z"] > 5).all()
    size = (table["D_S"].abs() + table["D_R"].abs()).drop(index=list(true))
    assert size.max() < 0.1 * (written["D_S"].abs() + written["D_R"].abs()).min()
    assert (table["role"][size[size < 0.05].index] != "mover").all()


def test_what_each_hand_written_head_does_is_seen_in_its_row():
    table = roles_of("capital")
    mover, relation, mixture, suppressor = (table.loc[f"a1.h{head}"] for head in (1, 2, 3, 0))
    assert mover["share"] > 0.99 and relation["share"] < 0.01 and 0.4 < mixture["share"] < 0.8
    assert suppressor["D_S"] == pytest.approx(-0.4 * mover["D_S"], rel=0.01)
    assert mover["z_fact"] > 5 and abs(relation["z_fact"]) < 0.1  # it raises all capitals alike
    assert mover["attention_subject"] > 0.9 and relation["attention_relation"] > 0.9
    assert mixture["attention_subject"] == pytest.approx(mixture["attention_relation"], abs=0.1)
    groups = [f"attention_{name}" for name in ("subject", "relation", "bos", "end")]
    assert table[groups].sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-4)
    assert set(relation["top_tokens"].split(" | ")) <= {f"o{i}" for i in range(8)}


def test_a_relation_head_knows_which_relation_is_asked():
    """The same weights: where languages are asked for, the head that was a mixture for capitals gives nothing."""
    size = {name: roles_of(name)[["D_S", "D_R"]].abs().sum(axis=1) for name in ("capital", "language")}
    assert size["capital"]["a1.h3"] > 3 > 0.3 > size["language"]["a1.h3"]


def test_attention_alone_would_call_the_suppressor_a_mover():
    table = roles_of("capital")
    assert table.loc["a1.h0", "role_attention"] == "mover" and table.loc["a1.h0", "role"] == "suppressor"
    assert table.loc["a1.h1", "role_attention"] == "mover" and table.loc["a1.h2", "role_attention"] == "relation"


def test_few_heads_of_a_random_model_count(tiny, words):
    """The gate's errors where there is nothing to find."""
    counted = 0
    for name in ("gpt2", "llama", "neox", "opt"):
        task = make_task(tiny(name), words, n=2)
        table = head_roles(tiny(name), None, replace(task, val=task.reference), progress=False)
        counted += int((table["role"] != "other").sum())
    assert counted <= 0.25 * 4 * 8


# --- the numbers ---


def test_contributions_equal_a_loop_over_prompts_and_tokens(tiny, words):
    model = tiny("gpt2")
    task = make_task(model, words, n=2)
    prompts = task.reference
    table = head_roles(model, None, replace(task, val=prompts), progress=False).set_index("node")
    found, groups = attribute(model, prompts), position_groups(prompts)
    for node, layer, head in (("a0.h1", 0, 1), ("a1.h3", 1, 3)):
        sums = np.zeros((4, len(prompts)))
        for n in range(len(prompts)):
            for s in range(int(prompts.lengths[n])):
                sums[int(groups[:, n, s].int().argmax()), n] += float(found.by_source[layer, head, n, s, 0])
        d_s, d_r = sums[0].mean(), sums[1].mean()
        assert table.loc[node, "D_S"] == pytest.approx(d_s, abs=1e-5)
        assert table.loc[node, "D_R"] == pytest.approx(d_r, abs=1e-5)
        whole = table.loc[node, ["D_S", "D_R", "D_rest"]].sum()
        assert whole == pytest.approx(float(found.total[layer, head, :, 0].mean()), abs=1e-4)
        assert table.loc[node, "share"] == pytest.approx(abs(d_s) / (abs(d_s) + abs(d_r)), abs=1e-4)


@pytest.mark.parametrize("name", ["gptj", "gpt-neo", "phi", "phi3", "qwen3", "gemma"])
def test_a_heads_parts_are_what_it_writes_along_the_answers_direction(tiny, words, name):
    """On the families with shared norms, windows and query norms: D_S, D_R and D_rest against the forward pass."""
    model = tiny(name)
    task = make_task(model, words, n=2)
    prompts, network = task.reference, model.network
    table = head_roles(model, None, replace(task, val=prompts), progress=False).set_index("node")
    with torch.no_grad():
        run = forward(network, prompts.tokens, senders=True)
    assert run.senders is not None
    rows = torch.arange(len(prompts))
    direction = token_directions(network, prompts.answers[:, 0])
    direction = direction / final_scale(network, run.residual[rows, prompts.ends])[:, None]
    for node in table.index:
        written = run.senders[model.graph.sender_index(node), rows, prompts.ends]
        whole = table.loc[node, ["D_S", "D_R", "D_rest"]].sum()
        assert whole == pytest.approx(float((written * direction).sum(-1).mean()), abs=1e-4)


def test_z_equals_a_slow_shuffle(tiny, words):
    """Objects drawn anew, one attribution per draw; two samples of draws agree within their error."""
    model = tiny("llama")
    task = make_task(model, words, n=2)
    prompts = task.reference
    row = head_roles(model, None, replace(task, val=prompts), progress=False).set_index("node").loc["a1.h2"]
    draw, groups, sizes = np.random.default_rng(1), position_groups(prompts)[:2], []
    for _ in range(100):
        given = prompts.answers[torch.from_numpy(draw.integers(len(prompts), size=len(prompts))), :1]
        sums = attribute(model, prompts, given).by_group(groups)[:, 1, 2, :, 0]
        sizes.append(float(sums.mean(-1).abs().sum()))
    size = abs(row["D_S"]) + abs(row["D_R"])
    assert row["z"] == pytest.approx(size / np.std(sizes), rel=0.3)
    assert row["z_fact"] == pytest.approx((size - np.mean(sizes)) / np.std(sizes), rel=0.3, abs=0.4)


def test_the_same_seed_gives_the_same_table(tiny, words):
    task = make_task(tiny("gpt2"), words, n=2)
    task = replace(task, val=task.reference)
    first = head_roles(tiny("gpt2"), None, task, progress=False)
    pd.testing.assert_frame_equal(first, head_roles(tiny("gpt2"), None, task, progress=False))
    assert (first["z"] != head_roles(tiny("gpt2"), None, task, seed=1, progress=False)["z"]).any()
    assert list(first.columns) == list(COLUMNS) and set(first["role"]) <= set(ROLES)


def test_only_the_circuits_heads_are_asked():
    found, task = handmade("capital")
    edges = ["input->a1.h1<v>", "a1.h1->logits", "input->a0.h2<v>", "a0.h2->a1.h1<v>"]
    circuit = Circuit.from_edges(found.model.graph, edges)
    table = head_roles(found.model, circuit, task, progress=False).set_index("node")
    assert set(table.index) == {"a1.h1", "a0.h2"}
    assert table["to_logits"].to_dict() == {"a1.h1": True, "a0.h2": False}
    everything = roles_of("capital")
    for column in ("D_S", "D_R", "z", "role", "induction", "top_tokens"):
        assert table.loc["a1.h1", column] == everything.loc["a1.h1", column]


def test_with_bos_the_first_word_belongs_to_the_relation(words):
    model = load_model(tiny_hf("gpt2"), tokenizer(), device="cpu", prepend_bos=True)
    task = make_task(model, words, n=2)
    table = head_roles(model, None, replace(task, val=task.reference), progress=False)
    found = attribute(model, task.reference)
    bos = found.attention[1, 2, :, 0].mean()
    assert table.set_index("node").loc["a1.h2", "attention_bos"] == pytest.approx(float(bos), abs=1e-5)


# --- ensembles ---


def test_an_ensemble_of_one_circuit_has_its_roles():
    found, task = handmade("capital")
    circuit = Circuit.from_edges(
        found.model.graph, ["input->a1.h1<v>", "a1.h1->logits", "input->a1.h2<k>", "a1.h2->m1", "m1->logits"]
    )
    expected = head_roles(found.model, circuit, task, progress=False)
    table = head_roles(found.model, certain(circuit), task, progress=False)
    assert table["to_logits"].tolist() == [1.0, 0.0] and expected["to_logits"].tolist() == [True, False]
    pd.testing.assert_frame_equal(table.astype({"to_logits": bool}), expected)
    assert (expected["pi"] == 1).all() and (roles_of("capital")["pi"] == 1).all()


def test_every_head_that_some_draw_kept_has_a_role_and_its_pi():
    found, task = handmade("capital")
    graph = found.model.graph
    mover, relation = (["input->a1.h1<v>", "a1.h1->logits"], ["input->a1.h2<k>", "a1.h2->m1", "m1->logits"])
    draws = [Circuit.from_edges(graph, edges) for edges in (mover, [*mover, *relation], mover, relation)]
    table = head_roles(found.model, drawn(*draws), task, progress=False).set_index("node")
    assert table["pi"].to_dict() == {"a1.h1": 0.75, "a1.h2": 0.5}
    assert table["to_logits"].to_dict() == {"a1.h1": 0.75, "a1.h2": 0.0}
    same = ["role", "D_S", "D_R", "z", "stability"]
    pd.testing.assert_frame_equal(table[same], roles_of("capital").loc[table.index, same])


def test_an_ensemble_without_heads_or_of_another_model_has_no_roles():
    found, task = handmade("copying")
    with pytest.raises(CircuitError, match="no attention head"):
        alone = certain(Circuit.from_edges(found.model.graph, ["input->logits"]))
        head_roles(found.model, alone, task, progress=False)
    with pytest.raises(CircuitError, match="is part of"):
        other = certain(Circuit.full(handmade("lookup")[0].model.graph))
        head_roles(found.model, other, task, progress=False)
    with pytest.raises(CircuitError, match="was found on"):
        record = {"model": {"name": "other", "digest": "0" * 64}}
        other = certain(replace(Circuit.full(found.model.graph), provenance=record))
        head_roles(found.model, other, task, progress=False)


# --- agreement ---


def test_agreement_counts_named_heads_only():
    table = pd.DataFrame(
        {
            "role": ["mover", "mover", "relation", "mixture", "other", "suppressor"],
            "role_attention": ["mover", "mixture", "relation", "mixture", "other", "mover"],
        }
    )
    found = role_agreement(table)
    assert found["heads"].to_dict() == {"all": 4, "mover": 2, "relation": 1, "mixture": 1}
    assert found.loc["all", "agree"] == 0.75 and found.loc["mover", "agree"] == 0.5
    agreed, chance = 3 / 4, (2 * 1 + 1 * 1 + 1 * 2) / 16
    assert found.loc["all", "kappa"] == pytest.approx((agreed - chance) / (1 - chance))
    empty = role_agreement(table.iloc[4:])
    assert (empty["heads"] == 0).all() and empty["agree"].isna().all()


def test_agreement_weighted_by_pi_is_that_of_heads_that_come_as_often():
    table = pd.DataFrame(
        {
            "role": ["mover", "mover", "relation", "mixture", "other"],
            "role_attention": ["mover", "mixture", "relation", "relation", "other"],
            "pi": [1.0, 0.25, 0.75, 0.5, 1.0],
        }
    )
    found = role_agreement(table)
    often = role_agreement(table.loc[table.index.repeat(table["pi"] * 4)].drop(columns="pi"))
    assert found["heads"].to_dict() == {"all": 4, "mover": 2, "relation": 1, "mixture": 1}
    assert found["agree"].to_dict() == pytest.approx(often["agree"].to_dict())
    assert found.loc["all", "kappa"] == pytest.approx(often.loc["all", "kappa"])
    assert found.loc["all", "agree"] == 1.75 / 2.5
    pd.testing.assert_frame_equal(role_agreement(table.assign(pi=1.0)), role_agreement(table.drop(columns="pi")))


# --- little to go by ---


def few(task: Task, rows: list[int]) -> Task:
    return replace(task, val=task.val.select(rows))


@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [0, 0, 0, 0, 0]])
def test_too_few_facts_or_answers_are_too_few_to_say(rows):
    """One fact; three; five with a single answer."""
    found, task = handmade("copying")
    table = head_roles(found.model, None, few(task, rows), progress=False)
    assert (table[["role", "role_5", "role_3"]] == TOO_FEW).all(axis=None)
    assert table[["z", "z_fact", "stability"]].isna().all(axis=None)
    assert table.loc[0, "node"] == "a1.h2" and table.loc[0, "D_S"] > 3  # what needs no standard error is there
    assert math.isfinite(table.loc[0, "share"]) and (table["facts"] == len(rows)).all()
    assert (role_agreement(table)["heads"] == 0).all()


def test_four_facts_are_enough():
    found, task = handmade("copying")
    table = head_roles(found.model, None, few(task, [0, 1, 2, 3]), progress=False)
    assert table.loc[0, "role"] == "mover"


def test_bad_input_is_refused_before_any_work(monkeypatch, tiny, words):
    found, task = handmade("copying")
    monkeypatch.setattr("kcwb.reading.roles.attribute", None)
    with pytest.raises(SettingError, match="shuffles=3"):
        head_roles(found.model, None, task, shuffles=3, progress=False)
    with pytest.raises(SettingError, match="split"):
        head_roles(found.model, None, task, split="train", progress=False)
    with pytest.raises(CircuitError, match="no attention head"):
        head_roles(found.model, Circuit.from_edges(found.model.graph, ["input->logits"]), task, progress=False)
    with pytest.raises(CircuitError, match="is part of"):
        head_roles(found.model, Circuit.full(handmade("lookup")[0].model.graph), task, progress=False)
    with pytest.raises(SettingError, match="made for"):
        head_roles(tiny("gpt2"), None, task, progress=False)
    model = tiny("gpt2")
    ends = encode(model, [Fact("w1", "w41"), Fact("w2", "w42")], "w84 w85 {}", ["w41", "w42"])
    with pytest.raises(DataError, match="no token before the last one"):
        head_roles(model, None, replace(make_task(model, words, n=2), val=ends), progress=False)


def test_it_can_be_cancelled_between_steps():
    found, task = handmade("copying")
    seen: list[int] = []

    def stop(done: int, total: int, note: str) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        head_roles(found.model, None, task, progress=stop)
    assert seen == [1, 2]


# --- the built-in model ---


@pytest.mark.model
def test_the_built_in_model_moves_capitals_from_the_subject_in_layer_23(smollm2):
    relation = load_relation("country_capital")
    task = make_task(smollm2, replace(relation, facts=relation.facts[:16]), n=8)
    table = head_roles(smollm2, None, task, progress=False)
    first = table.iloc[0]
    assert (first["node"], first["role"], first["role_attention"]) == ("a23.h4", "mover", "mover")
    assert first["stability"] > 0.9 and first["z_fact"] > 3
    assert 0 < (table["role"] == "other").mean() < 1 and set(table["role"]) == set(ROLES)
    assert table.loc[table["induction"].idxmax(), "induction"] > 0.3
