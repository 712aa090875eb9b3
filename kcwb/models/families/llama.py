"""Llama and those that differ little from it: rotary positions, root-mean-square norms, gated MLPs, grouped keys.

The built-in model, SmolLM2, is a Llama. Qwen2 has biases in the attention, Qwen3 norms of queries and keys, Phi-3 fused
weights, which the bridge takes apart; Mistral and Phi-3 have a sliding window, and the Qwens where it is switched on.
"""

from __future__ import annotations

from typing import Any

from kcwb.models.families.family import Family, register, usual_window


def _switched_window(config: Any, layer: int) -> int | None:
    return usual_window(config, layer) if config.use_sliding_window else None


_EXAMPLES = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "HuggingFaceTB/SmolLM2-360M")
register("llama", Family("Llama (TinyLlama, SmolLM2)", _EXAMPLES, checked="tiny random model; the built-in model"))
register("mistral", Family("Mistral", ("mistralai/Mistral-7B-v0.1",)))
register("qwen2", Family("Qwen2", ("Qwen/Qwen2.5-0.5B",), window=_switched_window))
register("qwen3", Family("Qwen3", ("Qwen/Qwen3-0.6B",), window=_switched_window))
register("phi3", Family("Phi-3", ("microsoft/Phi-3-mini-4k-instruct",)))
