"""The transformer as functions of nodes: equal to Hugging Face, on every covered architecture."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers as T
from torch._subclasses.fake_tensor import FakeTensorMode

from kcwb.errors import KcwbError, ModelError
from kcwb.models.forward import forward
from kcwb.models.loading import load_model
from kcwb.models.network import Network
from kcwb.models.reference import reference_run
from kcwb.models.weights import Norm
from tests.tiny import ARCHITECTURES, POST_NORM, WORDS, tiny_hf, tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_logits_equal_hugging_face(tiny, architecture: str, length: int) -> None:
    model = tiny(architecture)
    tokens = torch.randint(len(WORDS), (3, length))
    ours = model.network.logits(forward(model.network, tokens).residual)
    # A second copy that no bridge has wrapped.
    theirs = tiny_hf(architecture)(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4


def test_a_sliding_window_hides_what_is_older(tiny) -> None:
    model = tiny("mistral-window")  # window 3, two layers: position 7 sees positions 3 to 7 at most
    tokens = torch.randint(len(WORDS), (1, 8))
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % len(WORDS)
    before, after = (forward(model.network, some).residual[0] for some in (tokens, changed))
    assert torch.equal(before[7], after[7])
    assert not torch.allclose(before[6], after[6])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "qwen3", "neox", "opt", "gptj", "gemma3"])
def test_heads_and_positions_can_be_chosen(tiny, architecture: str) -> None:
    network = tiny(architecture).network
    x = torch.randn(4, 2, 7, network.d_model)
    q, k, v = network.queries(0, x), network.keys(0, x), network.values(0, x)
    every = network.head_results(0, q, k, v)
    heads, positions = torch.tensor([3, 1]), torch.tensor([2, 6])
    some = network.head_results(
        0,
        network.queries(0, x[heads][..., positions, :], heads, positions),
        network.keys(0, x[heads], heads),
        network.values(0, x[heads], heads),
        heads,
        positions,
    )
    torch.testing.assert_close(some, every[heads][..., positions, :])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_an_input_shared_by_all_heads_need_not_be_copied(tiny, architecture: str) -> None:
    network = tiny(architecture).network
    x = torch.randn(1, 2, 5, network.d_model)
    copied = x.expand(4, -1, -1, -1)
    for project in (network.queries, network.keys, network.values):
        torch.testing.assert_close(project(1, x), project(1, copied))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shares_of_the_logits_add_up_to_the_logits(tiny, architecture: str) -> None:
    network = tiny(architecture).network
    parts = torch.randn(3, 2, 5, network.d_model)
    whole = parts.sum(0)
    shares = network.logit_shares(parts).sum(0)
    torch.testing.assert_close(network.logits_of_shares(shares, whole), network.logits(whole), atol=1e-5, rtol=1e-4)


def test_attention_rows_sum_to_one_and_look_back_only(tiny) -> None:
    network = tiny("llama").network
    x = torch.randn(4, 5, network.d_model)
    pattern = network.pattern(0, network.queries(0, x), network.keys(0, x))
    torch.testing.assert_close(pattern.sum(-1), torch.ones(4, 5))
    assert not pattern.triu(1).any()


def test_an_edit_of_the_model_is_seen(tiny) -> None:
    model = tiny("gpt2")
    weight = model.bridge.original_model.transformer.h[1].mlp.c_proj.weight
    tokens = torch.randint(len(WORDS), (1, 4))
    before = forward(model.network, tokens).residual
    with torch.no_grad():
        saved = weight.clone()
        weight.mul_(2)
    edited = forward(model.network, tokens).residual
    with torch.no_grad():
        weight.copy_(saved)
    assert not torch.allclose(before, edited)
    assert torch.equal(before, forward(model.network, tokens).residual)


@pytest.mark.parametrize("architecture", POST_NORM)
def test_heads_that_share_a_norm_add_up_to_it_and_are_given_all_or_none(tiny, architecture: str) -> None:
    model = tiny(architecture)
    network, block = model.network, model.bridge.blocks[1]
    x = torch.randn(1, 2, 5, network.d_model)
    q, k, v = network.queries(1, x), network.keys(1, x), network.values(1, x)
    results = network.head_results(1, q, k, v)
    normed = block.ln1_post.original_component(results.sum(0))
    torch.testing.assert_close(network.head_outputs(1, q, k, v).sum(0), normed)
    with pytest.raises(KcwbError, match=r"Gemma.*share a norm"):
        network.head_outputs(1, q[:1], k[:1], v[:1], torch.tensor([0]))
    first = network.graph.head_senders(1)
    assert [network.together(row) for row in (0, first.start + 2, first.stop)] == [
        slice(0, 1),
        first,
        slice(first.stop, first.stop + 1),
    ]


def test_what_is_not_defined_under_post_norms_is_refused(tiny) -> None:
    for what in ("roles", "editing"):
        tiny("gemma").network.require(what)
        with pytest.raises(ModelError, match=r"not covered on Gemma 2: a norm follows"):
            tiny("gemma2").network.require(what)


def on_two_devices(network: Network) -> Network:
    """The same with its second layer and its end elsewhere; weights without values, for `FakeTensorMode`."""
    split = copy.copy(network)
    split._tables = {}
    for name in ("W_E", "_positions"):
        setattr(split, name, elsewhere(getattr(network, name), "cpu"))
    for name in ("norm_final", "W_U", "b_U"):
        setattr(split, name, elsewhere(getattr(network, name), "meta"))
    split.layers = [
        replace(layer, **{one.name: elsewhere(getattr(layer, one.name), place) for one in fields(layer)})
        for layer, place in zip(network.layers, ("cpu", "meta"), strict=True)
    ]
    return split


def elsewhere(value: Any, device: str) -> Any:
    """A tensor, or a norm's tensors, on another device; all else as it is."""
    if isinstance(value, Norm):
        return replace(value, weight=elsewhere(value.weight, device), bias=elsewhere(value.bias, device))
    return torch.empty_like(value, device=device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_on_several_devices_never_mix_them(tiny, architecture: str) -> None:
    """Tensors without values know their device, and refuse an operation with those of another one."""
    whole = tiny(architecture).network
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = on_two_devices(whole)
        assert [str(device) for device in network.devices] == ["cpu", "meta"]
        tokens = torch.zeros(2, 5, dtype=torch.long)
        run = forward(network, tokens, senders=True, receivers=True)
        kept = torch.ones(network.graph.exists.shape, dtype=torch.bool)
        cut = forward(network, tokens, kept=kept, ablated=run.senders)
        shares = network.logits_of_shares(network.logit_shares(run.residual), run.residual)
        heads, x = torch.tensor([3, 1]), torch.zeros(2, 2, 5, network.d_model)
        parts = [project(1, x, heads) for project in (network.queries, network.keys, network.values)]
        some = [*parts, network.head_results(1, *parts, heads), network.mlp_hidden(1, x)]
        for found in (run.residual, run.senders, cut.residual, network.logits(cut.residual), shares, *some):
            assert found is not None and found.device == network.device
        with pytest.raises(RuntimeError, match="device"):
            network.layers[1].norm_attention(run.residual)  # what each function sees to
    with pytest.raises(ModelError, match=r"not covered for a model on several devices \(cpu, meta\)"):
        network.require("roles")


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "qwen3", "gptj"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_self_check(architecture: str, dtype: torch.dtype) -> None:
    model = load_model(tiny_hf(architecture).to(dtype), tokenizer(), device="cpu")
    x = torch.randn(2, model.network.d_model, dtype=dtype)
    assert model.network.logits_of_shares(model.network.logit_shares(x), x).dtype == dtype


def tiny_gemma(**more: object) -> T.PreTrainedModel:
    small = dict(vocab_size=94, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**small, num_key_value_heads=1, head_dim=16, **more))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=94, hidden_size=32, n_layer=1, n_head=2)), "bloom"),
        (
            lambda: T.OPTForCausalLM(
                T.OPTConfig(
                    vocab_size=94,
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    ffn_dim=48,
                    word_embed_proj_dim=16,
                    do_layer_norm_before=False,
                )
            ),
            "post-layer-norm",
        ),
        (lambda: tiny_gemma(attention_bias=True), "Gemma 2 or 3 with attention biases"),
        (lambda: tiny_gemma(use_bidirectional_attention=True), "both directions"),
        (
            lambda: T.PhiForCausalLM(
                T.PhiConfig(
                    vocab_size=94,
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=48,
                    qk_layernorm=True,
                )
            ),
            "Phi with query and key norms",
        ),
    ],
)
def test_an_architecture_that_is_not_covered_is_refused_with_those_that_are(module, words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        load_model(module(), tokenizer())
    assert "GPT-2" in str(error.value) and "Pythia" in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_down_projection_is_the_models_own(tiny, architecture: str) -> None:
    """What edits write to: a change of it, in place, changes the Hugging Face model as it changes the network."""
    model = tiny(architecture)
    weight, tokens = model.network.layers[1].W_out, torch.randint(len(WORDS), (1, 4))
    before, saved = model.logits(tokens), weight.clone()
    try:
        weight.mul_(1.5).add_(0.1)
        edited = model.logits(tokens)
        ours = model.network.logits(forward(model.network, tokens).residual)
    finally:
        weight.copy_(saved)
    assert (edited - before).abs().max() > 1e-3 and (ours - edited).abs().max() < 1e-4
    assert torch.equal(model.logits(tokens), before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "qwen3", "phi3", "gemma", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_round_in_half_precision_as_hugging_face_does(architecture: str, dtype: torch.dtype) -> None:
    model = load_model(tiny_hf(architecture).to(dtype), tokenizer(), device="cpu")
    x = (3 * torch.randn(50, model.network.d_model)).to(dtype)
    block, layer = model.bridge.blocks[1], model.network.layers[1]
    for ours, theirs in ((layer.norm_attention, block.ln1), (model.network.norm_final, model.bridge.ln_final)):
        torch.testing.assert_close(ours(x), theirs.original_component(x), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj", "gpt-neo", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_are_as_exact_as_hugging_faces(architecture: str, dtype: torch.dtype) -> None:
    model = load_model(tiny_hf(architecture).to(dtype), tokenizer(), device="cpu")
    network, tokens = model.network, torch.randint(len(WORDS), (2, 12))
    own = reference_run(model.bridge, tokens)
    exact = reference_run(model.bridge, tokens, wide=torch.float32, like=own)
    for layer, (theirs, right) in enumerate(zip(own.layers, exact.layers, strict=True)):
        x = theirs.before[None]
        ours = network.scores(layer, network.queries(layer, x), network.keys(layer, x)).transpose(0, 1)
        seen = ~ours.isneginf()
        error, cost = ((scores.float() - right.scores)[seen].norm() for scores in (ours, theirs.scores))
        assert error <= 1.05 * cost
        assert network.pattern(layer, network.queries(layer, x), network.keys(layer, x)).dtype == dtype
