"""GPT-Neo: learned positions, scores that are not scaled, a window in every other layer."""

from __future__ import annotations

from typing import Any

from kcwb.models.families.family import Family, register


def _window(config: Any, layer: int) -> int | None:
    return config.window_size if config.attention_layers[layer] == "local" else None


register(
    "gpt_neo",
    Family(
        "GPT-Neo",
        ("EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B"),
        scale=lambda config, layer, d_head: 1.0,
        window=_window,
        float32_scores=True,
    ),
)
