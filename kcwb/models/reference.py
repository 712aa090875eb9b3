"""What Hugging Face's own code computes at each node: the reference that the self-check holds a Network against.

`transformer_lens` replaces modules of a model by its own, which compute attention again, for hooks. Here the model runs
with its own modules put back, and hooks on them record what each node reads and gives:

- the residual stream, where the norms before attention and MLP and the last norm read it;
- attention scores, where they go into the softmax (all covered architectures call `torch`'s, once a layer);
- each head's values mixed by attention, the input of the output projection, times the projection's own rows;
- what the attention as a whole and the MLP add, after the norm that follows them in some architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from kcwb.errors import ModelError
from kcwb.models.plain import unwrapped


@dataclass(frozen=True)
class LayerRun:
    """What one block computed: what attention and MLP read, scores (masked with a huge negative), what they add.

    `mixed` are all heads' values mixed by attention, side by side.
    """

    before: Float[Tensor, "N T D"]
    between: Float[Tensor, "N T D"]
    scores: Float[Tensor, "N H T T"]
    mixed: Float[Tensor, "N T HK"]
    attention: Float[Tensor, "N T D"]
    mlp: Float[Tensor, "N T D"]


@dataclass(frozen=True)
class Run:
    """What a model computed: layer by layer, what the last norm read, and the logits at the last position."""

    layers: list[LayerRun]
    final: Float[Tensor, "N T D"]
    logits: Float[Tensor, "N 1 V"]


@torch.no_grad()
def reference_run(
    bridge: Any, tokens: Int[Tensor, "N T"], *, wide: torch.dtype | None = None, like: Run | None = None
) -> Run:
    """Run the Hugging Face model that a TransformerBridge has wrapped, by its own code.

    With `wide`, in this floating-point type, on the very weights that the model has. With `like`, each block and the
    last norm read what they read in this other run: what the nodes compute from the same stream. ModelError if the
    attention does not show its scores (one that is not Hugging Face's "eager" one).
    """
    blocks = [_original(block) for block in bridge.blocks]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    scores: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = inputs[0], output

    def reading(stream: Tensor) -> Callable[..., tuple[Any, Any]]:
        def replace(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            new = stream if wide is None else stream.to(wide)
            return ((new, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": new})

        return replace

    parts = [_parts(block) for block in bridge.blocks]
    norm_final = _original(bridge.ln_final)
    with ExitStack() as stack:
        module = stack.enter_context(unwrapped(bridge.original_model))
        for one in {part for layer in parts for part in layer.values()} | {norm_final}:
            stack.callback(one.register_forward_hook(keep).remove)
        if like is not None:
            streams = [*(layer.before for layer in like.layers), like.final]
            for block, stream in zip([*blocks, norm_final], streams, strict=True):
                stack.callback(block.register_forward_pre_hook(reading(stream), with_kwargs=True).remove)
        stack.enter_context(_Watch(scores, wide))
        logits = module(tokens, use_cache=False, logits_to_keep=1).logits
    if len(scores) != len(blocks):
        raise ModelError(
            f"{type(module).__name__} computed its attention {len(scores)} times in the open, of {len(blocks)} layers. "
            "Load it with attn_implementation='eager'."
        )
    shape = (*tokens.shape, -1)
    layers = [
        LayerRun(
            before=seen[part["ln1"]][0],
            between=seen[part["ln2"]][0].reshape(shape),  # OPT's MLP reads one row per position
            scores=scores[index],
            mixed=seen[part["o"]][0],
            attention=seen[part["attention"]][1],
            mlp=seen[part["mlp"]][1].reshape(shape),
        )
        for index, part in enumerate(parts)
    ]
    return Run(layers, seen[norm_final][0], logits)


def output_weights(block: Any, n_heads: int) -> Float[Tensor, "H K D"]:
    """The output projection of a bridge's block by heads, from the Hugging Face module itself."""
    module = _original(block.attn.o)
    weight: Any = module.weight.T if isinstance(module, nn.Linear) else module.weight  # GPT-2's Conv1D is [in, out]
    return weight.unflatten(0, (n_heads, -1))


class _Watch(TorchFunctionMode):
    """Records what goes into each softmax; with a type `wide`, every operation is done in that type."""

    def __init__(self, scores: list[Tensor], wide: torch.dtype | None) -> None:
        super().__init__()
        self._scores, self._wide = scores, wide

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._wide is not None:
            if func is nn.functional.embedding:  # a look-up: only what is found need be widened
                return self._widened(func(*args, **kwargs))
            args, kwargs = tree_map(self._widened, (args, kwargs))
        if func is nn.functional.softmax:
            self._scores.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    def _widened(self, x: Any) -> Any:
        return x.to(self._wide) if isinstance(x, Tensor) and x.is_floating_point() else x


def _original(component: Any) -> nn.Module:
    return component.original_component


def _parts(block: Any) -> dict[str, nn.Module]:
    """The modules of a block whose inputs or outputs are recorded."""
    children = dict(block.named_children())
    ln1, out, down = _original(block.ln1), _original(block.attn.o), _original(block.mlp.out)
    return {
        "ln1": ln1,
        "ln2": _original(children["ln2"]) if "ln2" in children else ln1,  # GPT-J and Phi read both through one
        "o": out,
        "attention": _original(children["ln1_post"]) if "ln1_post" in children else out,
        "mlp": _original(children["ln2_post"]) if "ln2_post" in children else down,
    }
