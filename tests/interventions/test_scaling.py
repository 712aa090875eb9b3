"""Stronger heads, against Hugging Face's model with the columns of its output projection multiplied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.interventions import scaling as module
from kcwb.interventions.head_sets import answers_without
from kcwb.interventions.scaling import scale_heads
from kcwb.statistics import proportion_interval
from kcwb.tasks.prompts import encode
from kcwb.tasks.ranks import rank_of
from kcwb.tasks.task import make_task
from tests.handmade import copying_head
from tests.tasks import TEMPLATE, known_relation, unpadded_logits
from tests.tiny import tiny_hf, tiny_model

HEADS = ["a0.h1", "a1.h2", "a1.h0"]


@torch.no_grad()
def answers_scaled(name, prompts, heads, factor):
    """Rank and loss of each answer's first token by Hugging Face's code, one prompt at a time."""
    module = tiny_hf(name)
    width = module.config.hidden_size // module.config.num_attention_heads
    for head in heads:
        layer, number = (int(part[1:]) for part in head.split("."))
        columns = slice(number * width, (number + 1) * width)
        if name == "gpt2":
            module.transformer.h[layer].attn.c_proj.weight[columns] *= factor
        else:
            module.model.layers[layer].self_attn.o_proj.weight[:, columns] *= factor
    ends = zip(prompts.tokens, prompts.ends.tolist(), strict=True)
    logits = torch.stack([module(tokens[None, : end + 1]).logits[0, -1] for tokens, end in ends])
    own = prompts.answers[:, 0]
    losses = torch.nn.functional.cross_entropy(logits, own, reduction="none")
    return rank_of(logits, own).numpy(), losses.numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scaled_heads_answer_as_the_model_with_scaled_weights(name):
    model = tiny_model(name)
    prompts = make_task(model, known_relation(model, 9), n=6).val
    sets, factors = [HEADS, HEADS[:1], [], HEADS[1:]], [2.5, 0.3, 7.0, 1.0]
    ranks, losses = answers_without(model, prompts, sets, factors=factors, progress=False)
    for i, (heads, factor) in enumerate(zip(sets, factors, strict=True)):
        rank, loss = answers_scaled(name, prompts, heads, factor)
        assert losses[i] == pytest.approx(loss, abs=1e-4) and (ranks[i] == rank).all()


def test_of_several_right_answers_any_is_right(tiny):
    """Against a plain run: minus the logarithm of the summed probability, and the best rank among what is wrong."""
    model = tiny("llama")
    facts = [replace(fact, also=("w70", "w71")) for fact in known_relation(model, 9).facts if " " not in fact.object]
    prompts = encode(model, facts, TEMPLATE, [fact.object for fact in facts])
    (ranks, _), (losses, _) = answers_without(model, prompts, [[], HEADS], progress=False)
    assert ranks.tolist() == prompts.ranks.tolist()
    for fact, loss in zip(facts, losses, strict=True):
        p = unpadded_logits(model, fact)[0].float().softmax(-1)
        right = [model.tokenizer(name, add_special_tokens=False).input_ids[0] for name in set(fact.right)]
        assert loss == pytest.approx(-float(p[right].sum().log()), abs=1e-5)
    again = [replace(fact, object=fact.also[0], also=(fact.object, *fact.also[1:])) for fact in facts]
    swapped = encode(model, again, TEMPLATE, [fact.object for fact in facts])
    assert answers_without(model, swapped, [HEADS], progress=False)[0].tolist() == [
        answers_without(model, prompts, [HEADS], progress=False)[0][0].tolist()
    ]


def test_the_factor_is_that_of_the_lowest_loss_on_the_facts_of_d_val_and_what_it_does_is_counted(monkeypatch):
    model = tiny_model("llama")
    task = make_task(model, known_relation(model, 40, unknown=10), n=8, n_test=30)
    drawn, draw = [], module.matched_head_sets
    monkeypatch.setattr(module, "matched_head_sets", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    found = scale_heads(model, task, HEADS[2:], factors=[0.5, 2.0], draws=4, progress=False)
    val, test = (one.select(one.told_at_end.nonzero()[:, 0].tolist()) for one in (task.val, task.test))
    losses = {factor: answers_scaled("llama", val, HEADS[2:], factor)[1].mean() for factor in (0.5, 1.0, 2.0)}
    assert found.curve["loss"].tolist() == pytest.approx([*losses.values()], abs=1e-4)
    assert found.factor == min(losses, key=lambda factor: losses[factor]) != 1.0
    before, after = (answers_scaled("llama", test, HEADS[2:], factor)[0] for factor in (1.0, found.factor))
    table = found.summary.set_index("run")
    wrong = before > 1
    assert table["n_wrong"].unique() == [wrong.sum()] and 0 < wrong.sum() < len(wrong)
    assert table.loc["heads", "righted"] == (after[wrong] == 1).mean()
    assert tuple(table.loc["heads", ["low", "high"]]) == proportion_interval(after[wrong] == 1)
    assert table.loc["heads", "kept"] == (after[~wrong] == 1).mean()
    assert table.loc["heads", "hit_1"] == (after == 1).mean() and table.loc["model", "hit_1"] == (before == 1).mean()
    assert (found.facts["rank_before"] == before).all() and (found.facts["rank_after"] == after).all()
    (sets,) = drawn
    each = np.array([answers_scaled("llama", test, heads, found.factor)[0] for heads in sets])
    assert table.loc["random heads", "righted"] == pytest.approx((each[:, wrong] == 1).mean())
    as_many = (each[:, wrong] == 1).mean(1) >= table.loc["heads", "righted"]
    assert table.loc["heads", "p"] == (1 + as_many.sum()) / (1 + len(sets))


def test_where_nothing_is_better_than_the_model_nothing_is_changed():
    model = tiny_model("llama")
    task = make_task(model, known_relation(model, 30, unknown=6), n=8, n_test=20)
    found = scale_heads(model, task, HEADS, factors=[1.0], progress=False)
    assert found.factor == 1.0 and (found.facts["rank_before"] == found.facts["rank_after"]).all()
    assert found.summary["run"].tolist() == ["model", "heads"]
    row = found.summary.set_index("run").loc["heads"]
    assert row["righted"] == 0 and row["kept"] == 1 and np.isnan(row["p"])


def test_which_facts_are_wrong_is_what_the_model_says_here(tiny):
    """The ranks of the task are those of another run, in which ties may have fallen otherwise."""
    model = tiny("llama")
    task = make_task(model, known_relation(model, 30, unknown=6), n=8, n_test=20)
    turned = replace(task, test=replace(task.test, ranks=torch.ones_like(task.test.ranks)))
    found = [scale_heads(model, one, HEADS, draws=3, progress=False) for one in (task, turned)]
    assert found[0].summary.equals(found[1].summary) and not found[0].summary["righted"].isna().any()
    right = task.test.select((task.test.ranks == 1).nonzero()[:, 0].tolist())
    one_wrong = replace(right, ranks=right.ranks.index_fill(0, torch.tensor(0), 2))
    with pytest.raises(DataError, match=f"all {len(right)} facts of D_test right"):
        scale_heads(model, replace(task, test=one_wrong), HEADS, progress=False)


def test_what_cannot_be_meant_is_refused(tiny):
    model = tiny("llama")
    task = make_task(model, known_relation(model, 12), n=4)
    with pytest.raises(CircuitError, match="not an attention head"):
        scale_heads(model, task, ["m0"], progress=False)
    with pytest.raises(SettingError, match="at least one head"):
        scale_heads(model, task, [], progress=False)
    with pytest.raises(SettingError, match="factors"):
        scale_heads(model, task, HEADS, factors=[-1.0], progress=False)
    model, relation, *_ = copying_head()
    task, seen = make_task(model, relation, n=4), []
    empty = replace(task, test=task.test.select([]))
    for one, words in ((task, "nothing is left to improve"), (empty, "no prompts to look at")):
        with pytest.raises(DataError, match=words):
            scale_heads(model, one, ["a1.h2"], progress=lambda *step: seen.append(step))
    assert not seen  # before anything is run
