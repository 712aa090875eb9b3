"""The transformer as functions of nodes: equal to Hugging Face, on every covered architecture."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from kcwb.errors import ModelError
from kcwb.models.forward import forward
from kcwb.models.loading import load_model
from tests.tiny import ARCHITECTURES, WORDS, tiny_hf, tokenizer


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


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "neox", "opt"])
def test_heads_and_positions_can_be_chosen(tiny, architecture: str) -> None:
    network = tiny(architecture).network
    x = torch.randn(4, 2, 7, network.d_model)
    q, k, v = network.queries(0, x), network.keys(0, x), network.values(0, x)
    every = network.head_outputs(0, q, k, v)
    heads, positions = torch.tensor([3, 1]), torch.tensor([2, 6])
    some = network.head_outputs(
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
    ],
)
def test_an_architecture_that_is_not_covered_is_refused_with_those_that_are(module, words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        load_model(module(), tokenizer())
    assert "GPT-2" in str(error.value) and "Pythia" in str(error.value)
