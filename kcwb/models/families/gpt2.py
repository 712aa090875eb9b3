"""GPT-2: learned positions; scores may be scaled by the layer's number as well."""

from __future__ import annotations

from typing import Any

from kcwb.models.families.family import Family, register, usual_scale


def _uncovered(config: Any) -> str | None:
    if config.add_cross_attention:
        return "GPT-2 with cross-attention"
    # which the bridge scales all the same
    return None if config.scale_attn_weights else "GPT-2 with unscaled attention"


def _scale(config: Any, layer: int, d_head: int) -> float:
    return usual_scale(config, layer, d_head) / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)


register("gpt2", Family("GPT-2", ("gpt2", "gpt2-medium", "gpt2-large"), uncovered=_uncovered, scale=_scale))
