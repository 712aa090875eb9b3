"""The digest of a module's weights."""

from __future__ import annotations

import copy

import pytest
import torch

from kcwb.models.digest import weights_digest
from kcwb.models.loading import load_model
from tests.tiny import ARCHITECTURES, tiny_hf, tokenizer


class Tied(torch.nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.embed = torch.nn.Linear(3, 3, bias=False)
        self.embed.weight = self.head.weight if tie else torch.nn.Parameter(self.head.weight.detach().clone())


def test_digest_is_stable_across_copies_modes_and_gradients():
    module = tiny_hf("llama")
    digest = weights_digest(module)
    assert len(digest) == 64 and digest == weights_digest(module)
    assert digest == weights_digest(copy.deepcopy(module).train().requires_grad_(False))


def test_digest_is_the_same_in_every_process_and_version():
    module = torch.nn.Linear(2, 1)
    module.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    assert weights_digest(module) == "5bee5173448bc00a42b7b9f7adf805cb0115324678fd5f3e66c9595eac934ecd"


def test_digest_does_not_depend_on_memory_layout():
    module = torch.nn.Linear(3, 5)
    digest = weights_digest(module)
    module.weight.data = module.weight.data.t().contiguous().t()
    assert not module.weight.is_contiguous()
    assert weights_digest(module) == digest


def test_digest_changes_with_one_weight_and_returns_with_it():
    module = tiny_hf("gpt2")
    digest = weights_digest(module)
    weight = next(module.parameters()).data.view(-1)
    before = weight[7].clone()
    weight[7] = torch.nextafter(before, torch.tensor(torch.inf))
    assert weights_digest(module) != digest
    weight[7] = before
    assert weights_digest(module) == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_digest_changes_with_dtype(dtype):
    module = torch.nn.Linear(2, 2)
    assert weights_digest(copy.deepcopy(module).to(dtype)) != weights_digest(module)


def test_digest_changes_with_shape_and_name():
    flat, square = torch.nn.Module(), torch.nn.Module()
    flat.a, square.a = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(2, 2))
    other = torch.nn.Module()
    other.b = torch.nn.Parameter(torch.zeros(4))
    assert len({weights_digest(module) for module in (flat, square, other)}) == 3


def test_tied_tensors_count_once():
    tied, apart = Tied(tie=True), Tied(tie=False)
    alone = torch.nn.Module()
    alone.embed = torch.nn.Linear(3, 3, bias=False)
    alone.embed.weight = tied.head.weight
    assert weights_digest(tied) == weights_digest(alone)
    assert weights_digest(tied) != weights_digest(apart)


def test_persistent_buffers_count_and_others_do_not():
    module = torch.nn.Module()
    module.register_buffer("kept", torch.zeros(()))
    module.register_buffer("passing", torch.zeros(2), persistent=False)
    digest = weights_digest(module)
    module.passing += 1
    assert weights_digest(module) == digest
    module.kept += 1
    assert weights_digest(module) != digest


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_models_digest_is_that_of_the_plain_module_however_often_it_is_wrapped(name):
    module = tiny_hf(name)
    plain = weights_digest(module)
    first = load_model(module, tokenizer(), device="cpu")
    wrapped = first.bridge.original_model
    assert first.digest == plain == weights_digest(wrapped) == weights_digest(copy.deepcopy(wrapped))
    again = load_model(wrapped, tokenizer(), device="cpu")
    assert again.digest == plain == weights_digest(again.bridge.original_model)


def test_loading_leaves_a_module_in_memory_unwrapped():
    module = tiny_hf("gpt2").train()
    before = list(module.state_dict()), [type(part) for part in module.modules()], module.config.to_dict()
    load_model(module, tokenizer(), device="cpu")
    assert before == (list(module.state_dict()), [type(part) for part in module.modules()], module.config.to_dict())
    assert module.training
