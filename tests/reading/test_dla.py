"""Direct logit attribution by source: sums, oracles, groups, speed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from kcwb.errors import CircuitError, DataError, ModelError
from kcwb.models.families import FAMILIES
from kcwb.models.forward import forward
from kcwb.models.loading import Model, load_model
from kcwb.reading.dla import (
    attribute,
    dla_by_source,
    final_scale,
    head_outputs,
    named_heads,
    token_directions,
)
from kcwb.reading.positions import GROUPS, check_prompts, position_groups, says_its_object, without_copies
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, load_relation
from tests.tiny import ARCHITECTURES, POST_NORM, tiny_hf, tokenizer

TEMPLATE = "w80 {} w81 w82"
#: Tiny models of all families with roles, GPT-J, GPT-Neo, Phi, Phi-3 and Qwen3 among them.
COVERED = [name for name in ARCHITECTURES if name not in POST_NORM]


def some_prompts(model: Model, n: int = 5, template: str = TEMPLATE) -> Prompts:
    """Prompts of unequal length, with answers of one and two tokens."""
    facts = [Fact(f"w{i}" if i % 2 else f"w{i} w{i + 1}", f"w{40 + i}" if i % 3 else f"w{40 + i} w7") for i in range(n)]
    return encode(model, facts, template, [fact.object for fact in facts])


@torch.no_grad()
def senders_at_end(model: Model, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sender's output, and the residual stream, at END."""
    run = forward(model.network, prompts.tokens, senders=True)
    assert run.senders is not None
    rows = torch.arange(len(prompts))
    return run.senders[:, rows, prompts.ends], run.residual[rows, prompts.ends]


@pytest.mark.parametrize("name", COVERED)
def test_sources_and_bias_sum_to_the_heads_attribution(tiny, name):
    """The attribution of a whole head: its output as the forward pass has it, along the token's direction."""
    model = tiny(name)
    prompts = some_prompts(model)
    found = attribute(model, prompts)
    outputs, residual = senders_at_end(model, prompts)
    direction = token_directions(model.network, prompts.answers[:, 0]) / final_scale(model.network, residual)[:, None]
    for layer in range(2):
        heads = outputs[model.graph.head_senders(layer)]
        expected = (heads * direction).sum(-1)
        torch.testing.assert_close(found.total[layer, :, :, 0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head_outputs(model.network, found)[layer], heads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", COVERED)
def test_all_nodes_and_constants_sum_to_the_logit_above_the_mean(tiny, name):
    """What ties scale, gain and centring down: nothing of the model's own logits is left over."""
    model = tiny(name)
    network, prompts = model.network, some_prompts(model)
    outputs, residual = senders_at_end(model, prompts)
    scale = final_scale(network, residual)
    direction = token_directions(network, prompts.answers[:, 0])
    constants = sum(network.constant(layer) + torch.zeros(network.d_model) for layer in range(2))
    others = outputs.sum(0) - sum(outputs[model.graph.head_senders(layer)].sum(0) for layer in range(2)) + constants
    total = attribute(model, prompts).total[..., 0].sum((0, 1)) + (others * direction).sum(-1) / scale
    if network.norm_final.bias is not None:
        shift = network.norm_final.bias @ network.W_U
        total += shift[prompts.answers[:, 0]] - shift.mean()
    if network.b_U is not None:
        total += network.b_U[prompts.answers[:, 0]] - network.b_U.mean()
    logits = network.logits(residual)
    own = logits.gather(-1, prompts.answers[:, :1])[:, 0] - logits.mean(-1)
    torch.testing.assert_close(total, own, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-biases", "neox"])
def test_each_source_equals_what_the_bridges_hooks_give(tiny, name):
    """One prompt at a time, with transformer_lens's own pattern and values."""
    model = tiny(name)
    prompts = some_prompts(model)
    found = attribute(model, prompts)
    _, residual = senders_at_end(model, prompts)
    direction = token_directions(model.network, prompts.answers[:, 0]) / final_scale(model.network, residual)[:, None]
    for n in range(len(prompts)):
        length = int(prompts.lengths[n])
        _, cache = model.bridge.run_with_cache(prompts.tokens[n : n + 1, :length])
        for layer in range(2):
            pattern = cache["pattern", layer][0][:, -1]  # head, source
            values = cache["v", layer][0].reshape(length, -1, model.network.d_head)  # source, key/value head, channel
            values = values.repeat_interleave(4 // values.shape[1], 1)
            bias = model.network.layers[layer].b_V
            if bias is not None:
                values = values - bias.repeat_interleave(4 // bias.shape[0], 0)
            weights = model.network.layers[layer].W_O
            expected = torch.einsum("hs,shk,hkd,d->hs", pattern, values, weights, direction[n])
            torch.testing.assert_close(found.by_source[layer, :, n, :length, 0], expected, atol=1e-5, rtol=1e-4)
            assert (found.by_source[layer, :, n, length:] == 0).all()
            torch.testing.assert_close(found.attention[layer, :, n, :length], pattern, atol=1e-6, rtol=1e-5)


def test_targets_of_ones_own_choice(tiny):
    model = tiny("llama")
    prompts = some_prompts(model)
    targets = torch.tensor([[50, 60]] * len(prompts))
    both = attribute(model, prompts, targets)
    assert both.by_source.shape == (2, 4, len(prompts), prompts.tokens.shape[1], 2)
    for i in range(2):
        one = attribute(model, prompts, targets[:, i : i + 1])
        torch.testing.assert_close(both.total[..., i], one.total[..., 0], atol=1e-6, rtol=1e-5)


def test_chunks_of_prompts_give_the_same(tiny, monkeypatch):
    model = tiny("gpt2")
    prompts = some_prompts(model)
    whole = attribute(model, prompts)
    monkeypatch.setattr("kcwb.models.memory.prompts_at_once", lambda *_: 2)
    parts = attribute(model, prompts)
    for field in ("by_source", "bias", "attention", "mixed", "scale"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), atol=1e-6, rtol=1e-5)


# --- groups ---


def named_groups(prompts: Prompts, row: int) -> list[str]:
    groups = position_groups(prompts)[:, row]
    assert (groups.sum(0) == (torch.arange(groups.shape[1]) <= prompts.ends[row])).all()  # one each, none after END
    return [GROUPS[int(column.int().argmax())] for column in groups.T[: int(prompts.lengths[row])]]


def test_every_position_up_to_end_has_one_group(tiny):
    prompts = some_prompts(tiny("gpt2"))
    assert named_groups(prompts, 0) == ["BOS", "SUBJECT", "SUBJECT", "RELATION", "END"]
    assert named_groups(prompts, 1) == ["BOS", "SUBJECT", "RELATION", "END"]
    assert named_groups(some_prompts(tiny("gpt2"), template="{} w83 w1"), 0) == [
        "SUBJECT",
        "SUBJECT",
        "RELATION",
        "END",
    ]
    assert named_groups(some_prompts(tiny("gpt2"), template="w80 w81 {}"), 0) == ["BOS", "RELATION", "SUBJECT", "END"]


def test_bos_is_its_own_group_and_then_the_first_word_is_not():
    model = load_model(tiny_hf("gpt2"), tokenizer(), device="cpu", prepend_bos=True)
    assert named_groups(some_prompts(model), 1) == ["BOS", "RELATION", "SUBJECT", "RELATION", "END"]


def test_a_table_by_token_sums_to_the_attribution(tiny):
    model = tiny("opt")
    prompts = some_prompts(model)
    table = dla_by_source(model, prompts, ["a1.h3", "a0.h0"])
    found = attribute(model, prompts)
    sums = table.groupby(["subject", "node"])["contribution"].sum()
    for n, fact in enumerate(prompts.facts):
        assert sums[fact.subject, "a1.h3"] == pytest.approx(float(found.total[1, 3, n, 0]), abs=1e-5)
    first = table[(table["subject"] == "w1") & (table["node"] == "a0.h0")]
    assert first["token"].tolist() == ["w80", "w1", "w81", "w82", ""]
    assert first["group"].tolist() == ["BOS", "SUBJECT", "RELATION", "END", "bias"]
    assert first["attention"].sum() == pytest.approx(1.0, abs=1e-5)


# --- what is refused ---


@pytest.mark.parametrize("name", POST_NORM)
def test_families_without_roles_are_refused(tiny, name):
    model = tiny(name)
    assert not FAMILIES[model.network.family].roles
    with pytest.raises(ModelError, match="not covered on"):
        attribute(model, some_prompts(model, n=1))


def test_a_subject_that_is_not_before_end_is_refused(tiny):
    prompts = some_prompts(tiny("gpt2"))
    with pytest.raises(DataError, match="'w1' has no token before the last one"):
        check_prompts(some_prompts(tiny("gpt2"), template="w80 w81 {}"))
    with pytest.raises(DataError, match="has no token before"):  # a span that holds nothing: the subject was not found
        check_prompts(replace(prompts, subject_stop=prompts.subject_start))
    with pytest.raises(DataError, match="'w1' is a single token"):
        check_prompts(some_prompts(tiny("gpt2"), template="{}").select([1]))
    with pytest.raises(DataError, match="no prompts"):
        check_prompts(prompts.select([]))
    check_prompts(prompts)


def test_facts_whose_object_is_in_their_subject_are_left_out(tiny):
    model = tiny("gpt2")
    facts = [Fact("w1", "w41"), Fact("w2 w3", "w3 w7"), Fact("w5", "w5")]
    prompts = encode(model, facts, TEMPLATE, ["w41"])
    assert [says_its_object(model, prompts, i) for i in range(3)] == [False, True, True]
    with pytest.warns(UserWarning, match="'w2 w3' -> 'w3 w7', 'w5' -> 'w5': left out"):
        assert without_copies(model, prompts).facts == (facts[0],)
    with pytest.raises(DataError, match="No fact is left"):
        without_copies(model, prompts.select([1, 2]))


def test_only_heads_are_attributed(tiny):
    with pytest.raises(CircuitError, match="'m1' is not an attention head"):
        named_heads(tiny("gpt2"), ["a0.h0", "m1"])
    with pytest.raises(CircuitError, match=r"a2\.h0"):
        named_heads(tiny("gpt2"), ["a2.h0"])


# --- the built-in model ---


@pytest.mark.model
def test_on_the_built_in_model_it_is_exact_and_fast(smollm2):
    relation = load_relation("country_capital")
    prompts = encode(smollm2, relation.facts[:8], relation.prompt_templates_zs[0], relation.objects)
    attribute(smollm2, prompts.select([0]))
    started = time.process_time()
    found = attribute(smollm2, prompts)
    assert time.process_time() - started < 3.0  # CPU seconds; takes a third of one
    outputs, residual = senders_at_end(smollm2, prompts)
    scale = final_scale(smollm2.network, residual)
    direction = token_directions(smollm2.network, prompts.answers[:, 0]) / scale[:, None]
    heads = torch.stack([outputs[smollm2.graph.head_senders(layer)] for layer in range(30)])
    assert ((heads * direction).sum(-1) - found.total[..., 0]).abs().max() <= 1e-5
