"""What the tests of editing share: facts in words of the tiny tokenizer, and hooks on the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kcwb.editing.edit import Edit, edit
from kcwb.models.loading import Model
from kcwb.studies.editing_account.comparison import EditComparison, compare_edit
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.task import Task, make_task
from tests.tasks import known_relation
from tests.tiny import tiny_model

TEMPLATES = ("w1 {} w2", "w3 {} w4")
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


# --- a comparison ---


def large_edit(model: Model, fact: Fact, target: str, method: str = "ft_m") -> Edit:
    """An edit whose loss may stay where it likes."""
    more = {"lr": 0.1, "clamp": 0.3} if method == "ft_m" else {"prefixes": 2, "clamp": 3.0, "covariance": "identity"}
    return edit(
        model, fact, target, method, template=TEMPLATES[0], layer=0, steps=4, bound=99.0, progress=False, **more
    )


@pytest.fixture(scope="module")
def relation(model: Model) -> Relation:
    """Facts that the model knows, in two templates."""
    return replace(known_relation(model, 16), prompt_templates_zs=TEMPLATES)


@pytest.fixture(scope="module")
def task(model: Model, relation: Relation) -> Task:
    """Six of them."""
    return make_task(model, relation, n=6)


@pytest.fixture(scope="module")
def found(model: Model, task: Task) -> EditComparison:
    """One edit compared; it left no trace."""
    fact = task.val.facts[0]
    made = large_edit(model, fact, "w61")
    before = weights(model)
    comparison = compare_edit(model, made, task, edges=60, movers=["a0.h1", "a1.h0", "a1.h2"], draws=25, progress=False)
    assert same_bits(model, before)
    return comparison
