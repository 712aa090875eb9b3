"""What the tests of editing share: facts in words of the tiny tokenizer, and hooks on the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kcwb.models.loading import Model
from kcwb.tasks.relations import Fact
from tests.tiny import tiny_model

TEMPLATE = "w80 {} w81 w82"
FACT = Fact("w5 w6", "w40")
QUICK: dict[str, Any] = {"steps": 4, "prefixes": 3, "bound": float("inf"), "progress": False, "template": TEMPLATE}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama of its own, since these tests change weights."""
    return tiny_model("llama", seed=3)


def weights(model: Model) -> dict[str, torch.Tensor]:
    """A copy of every parameter of the Hugging Face model."""
    return {name: value.clone() for name, value in model.bridge.original_model.state_dict().items()}


def same_bits(model: Model, before: dict[str, torch.Tensor]) -> bool:
    """Whether every parameter has the bits that it had."""
    return all(torch.equal(value, before[name]) for name, value in model.bridge.original_model.state_dict().items())


@contextmanager
def added(model: Model, layer: int, position: int, change: torch.Tensor) -> Iterator[None]:
    """Add something to what an MLP writes at one position, in the Hugging Face model."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., position, :] += change  # OPT flattens prompts
        return output

    out: Any = model.bridge.blocks[layer].mlp.out
    handle = out.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def keys_and_outputs(model: Model, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a down-projection in the Hugging Face model's own run, `[N, T, M]` and `[N, T, D]`."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    out: Any = model.bridge.blocks[layer].mlp.out
    handle = out.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    try:
        model.logits(tokens)
    finally:
        handle.remove()
    return seen[0]
