"""Tiny random models of every covered architecture, and a tokenizer of whole words."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

from kcwb.models.encoder import Encoder, load_encoder
from kcwb.models.loading import Model, load_model
from kcwb.tasks.relations import Fact, Relation

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(90))]

_BASE = dict(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
_GROUPED = dict(_BASE, intermediate_size=48, num_key_value_heads=2)
_GPT2 = dict(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64)
_ENDS = dict(bos_token_id=1, eos_token_id=2)
_GPT_NEO = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    max_position_embeddings=64,
    attention_types=[[["global", "local"], 1]],
    window_size=3,
    **_ENDS,
)
_QWEN3 = dict(_GROUPED, head_dim=16, use_sliding_window=True, sliding_window=3, max_window_layers=1)
_TWO_KINDS = ["sliding_attention", "full_attention"]
_GEMMA = dict(_GROUPED, head_dim=8, query_pre_attn_scalar=16, sliding_window=3, layer_types=_TWO_KINDS)


def tokenizer() -> T.PreTrainedTokenizerFast:
    """Splits at white space; `w0` ... `w89` are words, all else is `<unk>`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _llama(**more: Any) -> Any:
    return T.LlamaForCausalLM(T.LlamaConfig(**{**_GROUPED, "pad_token_id": 0, **more}))


ARCHITECTURES = {
    "gpt2": lambda **more: T.GPT2LMHeadModel(T.GPT2Config(**{**_GPT2, **more})),
    "gpt2-inverse-scale": lambda: T.GPT2LMHeadModel(T.GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True)),
    "llama": _llama,
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-scaled-rope": lambda: _llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "mistral-window": lambda **more: T.MistralForCausalLM(T.MistralConfig(**{**_GROUPED, "sliding_window": 3, **more})),
    "qwen2": lambda **more: T.Qwen2ForCausalLM(T.Qwen2Config(**{**_GROUPED, **more})),
    "neox": lambda **more: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**{**_BASE, "intermediate_size": 48, **more})),
    "neox-sequential": lambda: T.GPTNeoXForCausalLM(
        T.GPTNeoXConfig(**_BASE, intermediate_size=48, use_parallel_residual=False)
    ),
    "opt": lambda **more: T.OPTForCausalLM(
        T.OPTConfig(**{**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1, **more})
    ),
    "gptj": lambda **more: T.GPTJForCausalLM(T.GPTJConfig(**{**_GPT2, "rotary_dim": 4, **_ENDS, **more})),
    "gpt-neo": lambda **more: T.GPTNeoForCausalLM(T.GPTNeoConfig(**{**_GPT_NEO, **more})),
    "phi": lambda **more: T.PhiForCausalLM(T.PhiConfig(**{**_GROUPED, **more})),
    "phi3": lambda **more: T.Phi3ForCausalLM(
        T.Phi3Config(**{**_GROUPED, "pad_token_id": 0, "sliding_window": 3, **more})
    ),
    "qwen3": lambda **more: T.Qwen3ForCausalLM(T.Qwen3Config(**{**_QWEN3, **more})),
    "gemma": lambda **more: T.GemmaForCausalLM(T.GemmaConfig(**{**_GROUPED, "head_dim": 8, **more})),
    "gemma2": lambda **more: T.Gemma2ForCausalLM(
        T.Gemma2Config(**{**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, **more})
    ),
    "gemma3": lambda **more: T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(**{**_GEMMA, "tie_word_embeddings": False, **more})
    ),
}
#: Those where a norm follows the attention: the heads of a layer share its scale.
POST_NORM = ("gemma2", "gemma3")

ENCODERS = {
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**_BASE, intermediate_size=48)),
    "roberta": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**_BASE, intermediate_size=48, pad_token_id=0)),
}


def tiny_hf(name: str, seed: int = 0, **more: Any) -> Any:
    """A tiny Hugging Face model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    module = (ARCHITECTURES | ENCODERS)[name](**more)
    with torch.no_grad():
        for parameter in module.parameters():
            offset = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
    return module.eval()


def tiny_model(name: str, seed: int = 0, **more: Any) -> Model:
    """The same, loaded and self-checked."""
    return load_model(tiny_hf(name, seed, **more), tokenizer(), device="cpu")


def tiny_encoder(name: str) -> Encoder:
    """A tiny encoder; `w89` is its mask."""
    words = tokenizer()
    words.mask_token = "w89"
    return load_encoder(tiny_hf(name), words, device="cpu")


def word_relation() -> Relation:
    """A relation over the tokenizer's words, with subjects and objects of one and two tokens."""
    subjects = [f"w{i}" if i % 3 else f"w{i} w{i + 1}" for i in range(24)]
    objects = [f"w{40 + i}" if i % 4 else f"w{40 + i} w7" for i in range(24)]
    templates = ("w80 {} w81 w82", "{} w83", "w84 w85 {}")
    facts = tuple(Fact(*pair) for pair in zip(subjects, objects, strict=True))
    return Relation("words", "factual", "word", "word", False, templates, templates, facts)
