"""Gemma: Llama with scaled embeddings, and norms that multiply by 1 + w, in float32.

Gemma 2 has a norm after attention and MLP too, bounds on scores and logits, and a window in every other layer; Gemma 3
has norms of queries and keys instead of the bounds, and a rotation of its own in the layers with a window.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from kcwb.models.families.family import Family, register


def _uncovered(config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return "a Gemma that reads in both directions (EmbeddingGemma)"
    return None


def _uncovered_2(config: Any) -> str | None:
    return "Gemma 2 or 3 with attention biases" if config.attention_bias else _uncovered(config)


def _uncovered_3(config: Any) -> str | None:
    if config.attn_logit_softcapping is not None:  # Hugging Face's own code ignores it
        return "Gemma 3 with a bound on attention scores"
    return _uncovered_2(config)


def _gain(weight: Tensor) -> Tensor:
    return 1.0 + weight.float()


_POST_NORM = partial(
    Family,
    roles=False,
    editing=False,
    note="a norm follows attention and MLP: a head's output is its share of the sum under the run's own scale, which "
    "all heads of a layer set together",
    activation=("hidden_activation", "hidden_act", "activation_function"),  # Gemma 1 does not read the first
    gain=_gain,
)
register("gemma", Family("Gemma", ("google/gemma-2b",), uncovered=_uncovered, gain=_gain))
register("gemma2", _POST_NORM("Gemma 2", ("google/gemma-2-2b",), uncovered=_uncovered_2))
register(
    "gemma3_text",
    _POST_NORM(
        "Gemma 3",
        ("google/gemma-3-270m", "google/gemma-3-1b-pt"),
        uncovered=_uncovered_3,
        rope=lambda config, layer: config.layer_types[layer],
    ),
)
