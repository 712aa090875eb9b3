"""The weights of a transformer, taken out of a `transformer_lens` bridge: heads first, what is not there is None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kcwb.errors import ModelError
from kcwb.models.families import Family


@dataclass(frozen=True)
class Norm:
    """A layer norm (`bias` may be None) or, with `rms`, a root-mean-square norm.

    `weight` is the gain. In float32 where Hugging Face keeps it so: Gemma stores w and multiplies by 1 + w.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalise the last axis."""
        if not self.rms:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if x.dtype != self.weight.dtype:
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)
        if x.dtype.itemsize == 2:  # rounded before the gain, as in Llama
            return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def frozen(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The same, with a scale that is a constant to gradients."""
        wide = x.float()
        wide = wide if self.rms else wide - wide.mean(-1, keepdim=True)
        scale = (wide.detach().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normed = wide * scale * self.weight.float()
        return (normed if self.bias is None else normed + self.bias.float()).to(x.dtype)

    def shares(self, parts: Float[Tensor, "h P *any D"]) -> Float[Tensor, "h P *any D"]:
        """What each of some parts adds to the norm of their sum, whose scale is held; the bias counts for the last.

        At least in float32.
        """
        wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
        wide = wide if self.rms else wide - wide.mean(-1, keepdim=True)
        scale = (wide.sum(1, keepdim=True).square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return added_to_last(wide * scale * self.weight.to(wide.dtype), self.bias)

    def factor(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What a root-mean-square norm multiplies `x` by: the gain over the root mean square."""
        wide = x.float()
        return (self.weight.float() * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


@dataclass(frozen=True)
class Layer:
    """The weights of one block, heads first; what the architecture lacks is None.

    `softcap` bounds attention scores; `rope` names the kind of rotary table, where layers differ; `norm_query` and
    `norm_key` act on each head's projection; `norm_heads` and `norm_mlp_output` on what attention and MLP write.
    """

    norm_attention: Norm
    norm_mlp: Norm
    W_Q: Float[Tensor, "H D K"]
    W_K: Float[Tensor, "G D K"]
    W_V: Float[Tensor, "G D K"]
    W_O: Float[Tensor, "H K D"]
    b_Q: Float[Tensor, "H K"] | None
    b_K: Float[Tensor, "G K"] | None
    b_V: Float[Tensor, "G K"] | None
    b_O: Float[Tensor, " D"] | None
    W_in: Float[Tensor, "D M"]
    W_gate: Float[Tensor, "D M"] | None
    W_out: Float[Tensor, "M D"]
    b_in: Float[Tensor, " M"] | None
    b_gate: Float[Tensor, " M"] | None
    b_out: Float[Tensor, " D"] | None
    scale: float
    window: int | None
    softcap: float | None = None
    rope: str | None = None
    norm_query: Norm | None = None
    norm_key: Norm | None = None
    norm_heads: Norm | None = None
    norm_mlp_output: Norm | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_Q.device


def added_to_last(parts: Float[Tensor, "h P *any D"], bias: Tensor | None) -> Float[Tensor, "h P *any D"]:
    """Parts of a sum to which a bias is added: the last one has it."""
    if bias is not None:
        parts[:, -1] += bias.to(parts.dtype)
    return parts


#: The names that a bridge gives; W_in and friends are `[in, out]`.
_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")


def read_layer(bridge: Any, family: Family, index: int) -> Layer:
    """One block of a bridge."""
    block, config = bridge.blocks[index], bridge.original_model.config
    weights = {name: detached(getattr(block.attn, name, None)) for name in _ATTENTION}
    weights |= {name: detached(getattr(block.mlp, name, None)) for name in _MLP}
    like = weights["W_Q"]

    def norm(part: Any, name: str) -> Norm | None:
        found = name in dict(part.named_children())
        return read_norm(getattr(part, name).original_component, like, family) if found else None

    norm_attention = read_norm(block.ln1.original_component, like, family)
    return Layer(
        norm_attention=norm_attention,
        norm_mlp=norm(block, "ln2") or norm_attention,  # GPT-J and Phi read both through one
        scale=family.scale(config, index, like.shape[-1]),
        window=family.window(config, index),
        softcap=getattr(config, "attn_logit_softcapping", None),
        rope=family.rope(config, index),
        norm_query=norm(block.attn, "q_norm"),
        norm_key=norm(block.attn, "k_norm"),
        norm_heads=norm(block, "ln1_post"),
        norm_mlp_output=norm(block, "ln2_post"),
        **weights,
    )


def read_norm(module: Any, like: Tensor, family: Family) -> Norm:
    """A norm; `like` says device and precision of the gain of one that has none."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, (int, float)):
        raise ModelError(f"The norm {type(module).__name__} is not covered: it has no eps.")
    weight = detached(module.weight)
    weight = like.new_ones(module.normalized_shape) if weight is None else family.gain(weight)
    return Norm(weight, detached(getattr(module, "bias", None)), eps, rms=not isinstance(module, torch.nn.LayerNorm))


def read_positions(bridge: Any, family: Family) -> Float[Tensor, "C D"] | None:
    """Learned position embeddings from position 0 on, or None."""
    if not hasattr(bridge, "pos_embed"):
        return None
    table = detached(bridge.pos_embed.original_component.weight)
    return table[family.position_offset(bridge.original_model.config) :]


def read_activation(config: Any, family: Family) -> Callable[[Tensor], Tensor]:
    """The MLP's activation."""
    from transformers.activations import ACT2FN

    for key in family.activation:
        if getattr(config, key, None) is not None:
            return ACT2FN[getattr(config, key)]
    raise ModelError(f"The configuration of this {config.model_type} model names no MLP activation.")


def read_context(n_ctx: int, config: Any) -> int:
    """The longest prompt: what the model reads, or that up to which its rotation is the same for every length."""
    if n_ctx < 1:
        raise ModelError(f"The configuration of this {config.model_type} model says that it reads {n_ctx} tokens.")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return n_ctx
    return min(n_ctx, rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def detached(weight: Tensor | None) -> Any:
    """A view of a weight without gradients: the same storage, so that an edit of the model is seen."""
    return None if weight is None else weight.detach()
