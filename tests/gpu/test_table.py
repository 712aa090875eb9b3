"""Seconds and peak memory on the device, printed as a table: `make gpu`.

Models have random weights and the layers of real ones, and a vocabulary of 94 words, of which they know some by chance.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers as T

from kcwb.discovery.discover import discover, score_edges
from kcwb.models.loading import load_model
from kcwb.tasks.task import make_task
from tests.tasks import known_relation
from tests.tiny import WORDS, tokenizer

_LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def _gpt2(layers: int, width: int, heads: int) -> Any:
    config = T.GPT2Config(vocab_size=len(WORDS), n_layer=layers, n_embd=width, n_head=heads, n_positions=64)
    return T.GPT2LMHeadModel(config)


SHAPES: dict[str, Any] = {
    "2 layers, to try this table": lambda: _gpt2(2, 64, 4),
    "GPT-2 small": lambda: _gpt2(12, 768, 12),
    "GPT-2 medium": lambda: _gpt2(24, 1024, 16),
    "TinyLlama": lambda: T.LlamaForCausalLM(T.LlamaConfig(vocab_size=len(WORDS), intermediate_size=5632, **_LLAMA)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_times_and_memory(device: str, shape: str) -> None:
    if device == "cpu" and not shape.startswith("2 layers"):
        pytest.skip("shapes of real models are for a GPU")
    torch.manual_seed(0)
    model = load_model(SHAPES[shape](), tokenizer(), device=device)
    task = make_task(model, known_relation(model, 24), n=8)
    size = min(1000, model.graph.n_edges // 2)
    for name, run in {
        "eap-ig": lambda: score_edges(model, task, "eap-ig", progress=False),
        "gim": lambda: score_edges(model, task, "gim", progress=False),
        f"acdc within gim:{size}": lambda: discover(
            model, task, "acdc", within=f"gim:{size}", checkpoint=False, progress=False
        ),
    }.items():
        seconds, peak = _measured(run, device)
        print(f"| {shape} | {len(task.val)} facts | {name} | {seconds:.2f} s | {peak} |", flush=True)
        assert seconds > 0


def _measured(run, device: str) -> tuple[float, str]:
    """Seconds of the second run, and the most memory that was taken."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        run()
        return time.perf_counter() - started, "not measured"
    run()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started, f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
