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
        # the bridge's zeros, so that each head has one
        if isinstance(part, torch.nn.Linear) and "bias" in part._buffers:
            del part.bias
            part.register_parameter("bias", None)
    return copied


@contextmanager
def unwrapped(module: torch.nn.Module) -> Iterator[Any]:
    """The module itself, for the time being with its own parts where a bridge has put its components."""
    replaced = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is not None and _ORIGINAL in child._modules
    ]
    try:
        for parent, name, child in replaced:
            parent._modules[name] = child._modules[_ORIGINAL]
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
