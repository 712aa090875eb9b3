"""A Hugging Face module as Hugging Face made it, whatever has been wrapped around its parts since."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ORIGINAL = "_original_component"


def is_wrapped(module: torch.nn.Module) -> bool:
    """Whether a `transformer_lens` bridge has put components of its own into a module."""
    return any(_ORIGINAL in part._modules for part in module.modules())


def plain_copy(module: torch.nn.Module) -> Any:
    """A copy of a module without a bridge's components. Its parameters and buffers are the same tensors, not copies.

    What is wrapped around the copy, or set on it, does not reach the module; a change of weights reaches both.
    """
    memo: dict[int, Any] = {id(one): one for one in (*module.parameters(), *module.buffers())}
    _copy_originals(module, memo)
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        if (
            isinstance(part, torch.nn.Linear) and "bias" in part._buffers
        ):  # the bridge's zeros, so that each head has one
            del part.bias
            part.register_parameter("bias", None)
    return copied


@contextmanager
def unwrapped(module: torch.nn.Module) -> Iterator[Any]:
    """The module itself, for the time being with its own parts where a bridge has put its components."""
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []

    def put_back(parent: torch.nn.Module) -> None:
        for name, child in list(parent._modules.items()):
            original = None if child is None else child._modules.get(_ORIGINAL)
            if child is not None and original is not None:
                replaced.append((parent, name, child))
                parent._modules[name] = child = original
            if child is not None:
                put_back(child)

    try:
        put_back(module)
        yield module
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


def _copy_originals(module: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Enter into `memo`, for every wrapper in a module, a copy of what it wraps; the innermost first."""
    wrapped = module._modules.get(_ORIGINAL)
    parts = module._modules.values() if wrapped is None else [wrapped]
    for part in parts:
        if part is not None and id(part) not in memo:
            _copy_originals(part, memo)
    if wrapped is not None:
        memo[id(module)] = copy.deepcopy(wrapped, memo)
