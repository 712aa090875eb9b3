"""The self-check: passes on every healthy model, and finds an error of 1% in any one node of one that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models
from torch import Tensor

from kcwb.errors import ModelError
from kcwb.models import forward, selfcheck
from kcwb.models.loading import Model, load_model
from kcwb.models.network import Network
from kcwb.models.selfcheck import self_check
from tests.tiny import ARCHITECTURES, tiny_hf, tokenizer

HALF = [torch.bfloat16, torch.float16]


def scaled(name: str, scale: float, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Model:
    """A tiny model whose weights are `scale` / 0.3 of those of `tiny_hf`."""
    module = tiny_hf(name, seed, **more)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale / 0.3)
    return load_model(module.to(dtype), tokenizer(), device="cpu")


def with_sink() -> Model:
    """A GPT-2 whose stream has a norm of 5,675 at position 0, and of 2 elsewhere; SmolLM2's is 5,675 and 15."""
    module = tiny_hf("gpt2")
    with torch.no_grad():
        position = module.transformer.wpe.weight[0]
        position.mul_(5675 / position.norm())
    return load_model(module, tokenizer(), device="cpu")


def with_layer(network: Network, layer: int, **changes: Any) -> Network:
    """The same with some of a layer's weights replaced."""
    wrong = copy.copy(network)
    wrong.layers = list(wrong.layers)
    wrong.layers[layer] = replace(wrong.layers[layer], **changes)
    return wrong


def signs(like: Tensor) -> Tensor:
    """1 or -1 at random, the same ones each time."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).sign()


def with_weight(network: Network, layer: int, name: str, head: int) -> Network:
    """The same with each of one head's weights of a kind 1% larger or smaller; those of its group, where they share."""
    weight = getattr(network.layers[layer], name).clone()
    part = weight[head * len(weight) // network.graph.n_heads]
    part *= 1 + 0.01 * signs(part)
    return with_layer(network, layer, **{name: weight})


def with_output(network: Network, method: str, layer: int, row: int | slice, constant: bool = False) -> Network:
    """The same with 1% of a typical entry added to what one head's `method` gives, or to an MLP's output."""
    wrong, right = copy.copy(network), getattr(network, method)

    def changed(at: int, *arguments: Tensor) -> Tensor:
        output = right(at, *arguments).clone()
        if at == layer:
            part = output[row]
            part += 0.01 * part.abs().mean() * (1.0 if constant else signs(part))
        return output

    setattr(wrong, method, changed)
    return wrong


def plants(network: Network) -> Iterator[tuple[str, Network]]:
    """Every head's every error of 1%, and every MLP's; what it is, and the network that has it."""
    for layer in range(network.graph.n_layers):
        for head in range(network.graph.n_heads):
            place = f"a{layer}.h{head}"
            yield f"{place} output", with_output(network, "head_outputs", layer, head)
            yield f"{place} output, constant", with_output(network, "head_outputs", layer, head, constant=True)
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                yield f"{place} {name}", with_weight(network, layer, name, head)
        yield f"m{layer}", with_output(network, "mlp", layer, slice(None))
        yield f"m{layer} constant", with_output(network, "mlp", layer, slice(None), constant=True)


def refused(model: Model, network: Network) -> bool:
    """Whether the self-check refuses a network as that of a model."""
    try:
        self_check(model.bridge, network, "tiny")
    except ModelError:
        return True
    return False


def missed(model: Model, wrongs: Callable[[Network], Iterator[tuple[str, Network]]] = plants) -> list[str]:
    """The planted errors that the self-check does not find; the Hugging Face model is run once for all of them."""
    runs, right = {}, selfcheck.reference_run

    def run(bridge: Any, tokens: Tensor, *, wide: torch.dtype | None = None, like: Any = None) -> Any:
        asked = (wide, id(like), str(tokens.tolist()))
        if asked not in runs:
            runs[asked] = right(bridge, tokens, wide=wide, like=like)
        return runs[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "reference_run", run)
        return [what for what, wrong in wrongs(model.network) if not refused(model, wrong)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_error_of_one_percent_in_any_head_or_mlp_is_found(tiny, architecture: str) -> None:
    assert missed(tiny(architecture)) == []


@pytest.mark.parametrize(
    "make",
    [
        with_sink,
        lambda: scaled("llama", 0.02),
        lambda: scaled("gpt2", 0.02),
        lambda: scaled("gemma3", 0.02),
        lambda: scaled("llama", 0.3, num_hidden_layers=8, num_attention_heads=2),
        lambda: scaled("gpt2", 0.3, n_layer=8, n_head=1),
    ],
    ids=["sink", "small llama", "small gpt2", "small gemma3", "deep llama", "deep gpt2"],
)
def test_so_it_is_with_a_sink_small_weights_and_many_layers(make: Callable[[], Model]) -> None:
    assert missed(make()) == []


@pytest.mark.model
def test_so_it_is_in_the_built_in_model(smollm2: Model) -> None:
    network = smollm2.network
    assert refused(smollm2, with_weight(network, 2, "W_K", 4))
    assert refused(smollm2, with_output(network, "head_outputs", 13, 8))
    assert refused(smollm2, with_output(network, "mlp", 29, slice(None)))


# --- healthy models ---


@pytest.mark.parametrize(
    ("architecture", "dtype", "scale"),
    [
        (architecture, dtype, (0.02, 0.3)[(i + j) % 2])  # each precision at one scale, on the next one at the other
        for i, architecture in enumerate(ARCHITECTURES)
        for j, dtype in enumerate([torch.float32, *HALF])
    ],
)
def test_healthy_models_pass_in_every_precision(architecture: str, dtype: torch.dtype, scale: float) -> None:
    assert scaled(architecture, scale, 1, dtype).dtype == dtype


def test_float32_differences_of_healthy_models_are_a_hundredth_of_the_bound(tiny) -> None:
    for architecture in ARCHITECTURES:
        model = tiny(architecture)
        assert max(self_check(model.bridge, model.network, model.name).values()) < 5e-6


@pytest.mark.model
@pytest.mark.parametrize("dtype", HALF)
def test_the_built_in_model_passes_in_half_precision(dtype: torch.dtype) -> None:
    assert load_model(dtype=dtype).dtype == dtype


def test_pruned_nodes_pass_and_an_error_in_them_is_found() -> None:
    module = tiny_hf("llama")
    with torch.no_grad():
        module.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
        module.model.layers[0].self_attn.q_proj.weight.zero_()
        module.model.layers[1].mlp.down_proj.weight.zero_()
    model = load_model(module, tokenizer(), device="cpu")
    weight = model.network.layers[0].W_O.clone()
    weight[1, 0, 0] = 1e-6
    assert refused(model, with_layer(model.network, 0, W_O=weight))


@pytest.mark.parametrize(("architecture", "setting"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
@pytest.mark.parametrize("context", [1, 2, 5])
def test_short_contexts_pass(architecture: str, setting: str, context: int) -> None:
    module = tiny_hf(architecture, **{setting: context})
    assert load_model(module, tokenizer(), device="cpu").network.n_ctx == context


@pytest.mark.parametrize("size", [1, 3])
def test_small_vocabularies_pass(size: int) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    few = T.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0", pad_token="w0")
    module = tiny_hf("llama", vocab_size=size)
    assert load_model(module, few, device="cpu").network.d_vocab == size


# --- what is refused, and how ---


def test_the_message_names_model_check_node_difference_bound_and_what_to_do(tiny) -> None:
    model = tiny("llama")
    wrong = with_output(model.network, "head_outputs", 1, 2)
    with pytest.raises(
        ModelError,
        match=r"^tiny failed its self-check 'head outputs' at a1\.h2: difference 0\.00\d+, allowed 0\.0001 in float32.*"
        r"would be wrong.*report its architecture \(llama\).*transformers \d",
    ):
        self_check(model.bridge, wrong, "tiny")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(tiny, value: float) -> None:
    model = tiny("llama")
    for name in ("W_Q", "W_V", "W_out"):
        weight = getattr(model.network.layers[1], name).clone()
        weight[(0,) * weight.ndim] = value
        assert refused(model, with_layer(model.network, 1, **{name: weight}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_own_values_are_not_finite_is_refused(value: float) -> None:
    module = tiny_hf("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[3, 4] = value
    with pytest.raises(ModelError, match=r"'MLP outputs'.*Hugging Face itself.*not finite, in m1.*whole"):
        load_model(module, tokenizer(), device="cpu")


def test_what_overflows_in_float16_is_refused_with_what_to_do() -> None:
    module = tiny_hf("llama")
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(ModelError, match=r"float16.*not finite.*'bfloat16'"):
        load_model(module.half(), tokenizer(), device="cpu")


@pytest.mark.parametrize("part", ["queries", "constant", "embed", "logits"])
def test_what_joins_the_nodes_is_checked_too(tiny, part: str) -> None:
    network = tiny("gpt2").network
    wrong, right = copy.copy(network), getattr(network, part)
    setattr(wrong, part, lambda *arguments: 1.01 * right(*arguments))
    assert refused(tiny("gpt2"), wrong)


@pytest.mark.parametrize("architecture", ["llama", "neox"])
def test_blocks_of_the_wrong_kind_are_refused(tiny, architecture: str) -> None:
    model = tiny(architecture)
    wrong = copy.copy(model.network)
    wrong.graph = replace(wrong.graph, parallel=not wrong.graph.parallel)
    with pytest.raises(ModelError, match=r"'plain pass = Hugging Face's stream' at m0"):
        self_check(model.bridge, wrong, "tiny")


@pytest.mark.parametrize("edges", ["kept", "cut"])
def test_a_masked_pass_that_mixes_edges_up_is_refused(tiny, edges: str, monkeypatch) -> None:
    """The ablated outputs of the wrong senders, or a mask that is one column off."""
    right = forward.forward

    def wrong(network: Any, tokens: Tensor, *, kept=None, ablated=None, **more: Any) -> Any:
        if kept is not None and bool(kept.any()) == (edges == "kept"):
            kept = kept.roll(1, 1) if edges == "kept" else kept
            ablated = ablated.roll(1, 0) * 1.001
        return right(network, tokens, kept=kept, ablated=ablated, **more)

    monkeypatch.setattr(selfcheck, "forward", wrong)
    with pytest.raises(ModelError, match=f"all edges {edges}"):
        self_check(tiny("llama").bridge, tiny("llama").network, "tiny")


# --- half precision ---


def gross(network: Network) -> Iterator[tuple[str, Network]]:
    """Errors in kind, not in degree, that the last layer of an architecture can have."""
    last = len(network.layers) - 1
    weights = network.layers[last]
    swapped = torch.tensor([1, 0, *range(2, network.graph.n_heads)])
    yield "heads swapped", with_layer(network, last, W_O=weights.W_O[swapped])
    for name in ("b_Q", "b_V", "b_O", "b_in", "b_gate", "b_out"):
        bias = getattr(weights, name)
        if bias is not None and bool(bias.any()):
            yield f"no {name}", with_layer(network, last, **{name: None})
    for name in ("norm_attention", "norm_mlp", "norm_query", "norm_key", "norm_heads", "norm_mlp_output"):
        norm = getattr(weights, name)
        if norm is not None:
            plain = replace(norm, weight=torch.ones_like(norm.weight))
            yield f"{name} without gain", with_layer(network, last, **{name: plain})
    if weights.softcap is not None:
        yield "no softcap", with_layer(network, last, softcap=None)
    if weights.window is not None:
        yield "no window", with_layer(network, last, window=None)
    yield "scale", with_layer(network, last, scale=1.3 * weights.scale)
    if network._rotary is not None:
        wrong = copy.copy(network)
        wrong._rotary = None
        yield "no rotary embedding", wrong
        wrong = copy.copy(network)
        wrong._about = replace(network._about, interleaved=not network._about.interleaved)
        x = torch.randn(1, 1, 4, network.d_model, dtype=network.dtype)
        if not torch.equal(wrong.keys(last, x), network.keys(last, x)):  # which they are where two channels turn
            yield "other rotary embedding", wrong


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_still_finds_gross_errors(architecture: str, dtype: torch.dtype) -> None:
    model = load_model(tiny_hf(architecture).to(dtype), tokenizer(), device="cpu")
    assert missed(model, gross) == []
