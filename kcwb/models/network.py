"""The transformer as functions of its nodes. The only code that knows architectures.

Each function maps what a receiver reads (the residual stream *before* its layer norm) to what its node computes, for
any number of prompts or candidates at once. The head axis comes first, so that all heads of a layer are one batched
product:

- `queries`, `keys`, `values`: `[h, ..., T, D] -> [h, ..., T, K]` (an input with head axis 1 is shared by all heads);
- `head_outputs`: queries, keys and values to outputs through W_O, without b_O, `[h, ..., T, D]`;
- `mlp`, `logits`: `[..., D] -> [..., D]`, `[..., D] -> [..., V]`.

Weights are the canonical ones that `TransformerBridge` exposes (`W_Q[H, D, K]`, ..., `W_K[G, D, K]` with G key/value
heads). They are taken when the network is built; layer norms and rotary tables follow the Hugging Face modules' own
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.errors import ModelError
from kcwb.models.graph import Graph

#: Hugging Face `model_type` -> what people call the family. Everything else is refused.
FAMILIES = {
    "gpt2": "GPT-2",
    "llama": "Llama (TinyLlama, SmolLM2)",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "gpt_neox": "GPT-NeoX (Pythia)",
    "opt": "OPT",
}


@dataclass(frozen=True)
class Norm:
    """A layer norm (`bias` may be None) or, with `rms`, a root-mean-square norm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalise the last axis."""
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """The weights of one block, heads first; a bias that the architecture lacks is None."""

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


class Network:
    """A transformer as functions of nodes.

    Parameters
    ----------
    bridge
        A `transformer_lens` TransformerBridge around a Hugging Face causal language model of one of `FAMILIES`.

    Raises
    ------
    ModelError
        If the architecture, or an option of it, is not covered.
    """

    def __init__(self, bridge: Any) -> None:
        config = bridge.original_model.config
        self.family = covered_family(config)
        cfg = bridge.cfg
        self.d_model: int = cfg.d_model
        self.n_ctx: int = cfg.n_ctx
        self.graph = Graph(cfg.n_layers, cfg.n_heads, parallel=bool(cfg.parallel_attn_mlp))
        self.layers = [_layer(bridge, config, index) for index in range(cfg.n_layers)]
        self.norm_final = _norm(bridge.ln_final.original_component)
        self.W_E: Float[Tensor, "V D"] = _detached(bridge.embed.original_component.weight)
        self.W_U: Float[Tensor, "D V"] = _detached(bridge.unembed.original_component.weight).T
        self.b_U: Float[Tensor, " V"] | None = _detached(bridge.unembed.original_component.bias)
        if self.b_U is not None and not self.b_U.any():
            self.b_U = None
        self.d_vocab: int = self.W_U.shape[1]
        self.d_head: int = self.layers[0].W_Q.shape[2]
        self.n_kv_heads: int = self.layers[0].W_K.shape[0]
        self._positions = _position_table(bridge, config)
        self._rotary = bridge.rotary_emb.original_component if hasattr(bridge, "rotary_emb") else None
        self._table: tuple[Tensor, Tensor] | None = None
        self._activation = _activation(config)
        self._group = self.graph.n_heads // self.n_kv_heads

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type."""
        return self.W_E.dtype

    def embed(self, tokens: Int[Tensor, "... T"]) -> Float[Tensor, "... T D"]:
        """Token plus learned position embedding: the output of the sender `input`."""
        x = F.embedding(tokens, self.W_E)
        return x if self._positions is None else x + self._positions[: tokens.shape[-1]]

    def queries(
        self,
        layer: int,
        x: Float[Tensor, "h ... T D"],
        heads: Int[Tensor, " h"] | None = None,
        positions: Int[Tensor, "*N T"] | None = None,
    ) -> Float[Tensor, "h ... T K"]:
        """Queries (rotated, where the architecture does) of `heads` (default: all) at `positions` (default: 0..T-1).

        Positions may be the same for all prompts, `[T]`, or each prompt's own, `[N, T]`.
        """
        weights = self.layers[layer]
        return self._rotate(_project(weights.norm_attention(x), weights.W_Q, weights.b_Q, heads), positions)

    def keys(
        self,
        layer: int,
        x: Float[Tensor, "h ... T D"],
        heads: Int[Tensor, " h"] | None = None,
        positions: Int[Tensor, "*N T"] | None = None,
    ) -> Float[Tensor, "h ... T K"]:
        """Keys, rotated like the queries; under grouped-query attention, one per query head."""
        weights = self.layers[layer]
        kv = self._kv_heads(heads)
        return self._rotate(_project(weights.norm_attention(x), weights.W_K, weights.b_K, kv), positions)

    def values(
        self, layer: int, x: Float[Tensor, "h ... T D"], heads: Int[Tensor, " h"] | None = None
    ) -> Float[Tensor, "h ... T K"]:
        """Values; under grouped-query attention, one per query head."""
        weights = self.layers[layer]
        return _project(weights.norm_attention(x), weights.W_V, weights.b_V, self._kv_heads(heads))

    def pattern(
        self,
        layer: int,
        q: Float[Tensor, "h ... Q K"],
        k: Float[Tensor, "h ... T K"],
        positions: Int[Tensor, "*N Q"] | None = None,
    ) -> Float[Tensor, "h ... Q T"]:
        """Attention probabilities of queries at `positions` (default: 0..T-1) over keys at 0..T-1."""
        weights = self.layers[layer]
        scores = q @ k.transpose(-1, -2) * weights.scale
        seen = torch.arange(k.shape[-2], device=k.device)
        at = seen if positions is None else positions
        hidden = seen > at[..., None]
        if weights.window is not None:
            hidden |= seen <= at[..., None] - weights.window
        return scores.masked_fill(hidden, -math.inf).softmax(-1)

    def head_outputs(
        self,
        layer: int,
        q: Float[Tensor, "h ... Q K"],
        k: Float[Tensor, "h ... T K"],
        v: Float[Tensor, "h ... T K"],
        heads: Int[Tensor, " h"] | None = None,
        positions: Int[Tensor, "*N Q"] | None = None,
    ) -> Float[Tensor, "h ... Q D"]:
        """Outputs of heads through W_O, without the shared bias b_O."""
        mixed = self.pattern(layer, q, k, positions) @ v
        return _project(mixed, self.layers[layer].W_O, None, heads)

    def mlp(self, layer: int, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Output of an MLP, its bias included."""
        return self.mlp_output(layer, self.mlp_hidden(layer, x))

    def mlp_hidden(self, layer: int, x: Float[Tensor, "... D"]) -> Float[Tensor, "... M"]:
        """The MLP's hidden activations: the input of its down-projection."""
        weights = self.layers[layer]
        x = weights.norm_mlp(x)
        hidden = _affine(x, weights.W_in, weights.b_in)
        if weights.W_gate is None:
            return self._activation(hidden)
        return self._activation(_affine(x, weights.W_gate, weights.b_gate)) * hidden

    def mlp_output(self, layer: int, hidden: Float[Tensor, "... M"]) -> Float[Tensor, "... D"]:
        """The MLP's down-projection."""
        weights = self.layers[layer]
        return _affine(hidden, weights.W_out, weights.b_out)

    def logits(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits from the final residual stream."""
        return _affine(self.norm_final(x), self.W_U, self.b_U)

    def logit_shares(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """What a part of the final residual stream adds to the logits, before the final norm's scale; linear in `x`."""
        norm = self.norm_final
        if not norm.rms:
            x = x - x.mean(-1, keepdim=True)
        return _affine(x * norm.weight, self.W_U, None)

    def logits_of_shares(self, shares: Float[Tensor, "... V"], x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits from the sum of all parts' `logit_shares` and the residual stream `x` that the parts add up to."""
        norm = self.norm_final
        wide = x.float()  # as the norms themselves do
        variance = wide.square().mean(-1, keepdim=True) if norm.rms else wide.var(-1, correction=0, keepdim=True)
        logits = shares * (variance + norm.eps).rsqrt().to(shares.dtype)
        if norm.bias is not None:
            logits = logits + _affine(norm.bias, self.W_U, None)
        return logits if self.b_U is None else logits + self.b_U

    def constant(self, layer: int) -> Float[Tensor, " D"] | float:
        """What a layer's attention adds that belongs to no edge: its shared bias b_O (0.0 if there is none)."""
        bias = self.layers[layer].b_O
        return 0.0 if bias is None else bias

    def _kv_heads(self, heads: Int[Tensor, " h"] | None) -> Int[Tensor, " h"] | None:
        if heads is None:
            if self._group == 1:
                return None
            heads = torch.arange(self.graph.n_heads, device=self.device)
        return heads.div(self._group, rounding_mode="floor")

    def _rotate(
        self, x: Float[Tensor, "h ... T K"], positions: Int[Tensor, "*N T"] | None
    ) -> Float[Tensor, "h ... T K"]:
        """Rotary position embedding on the first channels (all of them, for Llama), as Hugging Face rotates."""
        if self._rotary is None:
            return x
        cos, sin = self._rotary_tables(x, positions)
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _rotary_tables(
        self, x: Float[Tensor, "h ... T K"], positions: Int[Tensor, "*N T"] | None
    ) -> tuple[Float[Tensor, "*N T r"], Float[Tensor, "*N T r"]]:
        """Cosines and sines of positions, from Hugging Face's own module; kept, since every projection asks."""
        if positions is None:
            needed = x.shape[-2]
        elif self._table is None or not positions.is_cuda:
            needed = int(positions.max()) + 1
        else:
            needed = 0  # on CUDA, looking would stall; a table too short fails there by itself
        table = self._table  # a name of our own: panels run a model on more than one thread
        if table is None or table[0].shape[0] < needed:
            assert self._rotary is not None  # asked only where the architecture rotates
            steps = torch.arange(needed, device=x.device)
            cos, sin = self._rotary(x.detach(), steps[None])
            table = self._table = cos[0], sin[0]
        rows = slice(needed) if positions is None else positions
        return table[0][rows], table[1][rows]


def _project(
    x: Float[Tensor, "h ... I"], weight: Float[Tensor, "G I O"], bias: Tensor | None, heads: Tensor | None
) -> Float[Tensor, "h ... O"]:
    """One linear map per head, as a single batched product; `x` with head axis 1 is shared by all heads."""
    if heads is not None:
        weight = weight[heads]
        bias = None if bias is None else bias[heads]
    n_heads, shape = weight.shape[0], x.shape[1:-1]
    flat = x.reshape(x.shape[0], -1, x.shape[-1]).expand(n_heads, -1, -1)
    out = torch.bmm(flat, weight) if bias is None else torch.baddbmm(bias[:, None], flat, weight)
    return out.reshape(n_heads, *shape, weight.shape[-1])


def _affine(x: Float[Tensor, "... I"], weight: Float[Tensor, "I O"], bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.T, bias)


def _detached(weight: Tensor | None) -> Any:
    """A view of a weight without gradients: the same storage, so that an edit of the model is seen."""
    return None if weight is None else weight.detach()


def covered_family(config: Any) -> str:
    """The family of a Hugging Face configuration; ModelError if it, or an option of it, is not covered."""
    family = config.model_type
    problem = None
    if family not in FAMILIES:
        problem = f"architecture {family!r}"
    elif family == "opt" and (not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size):
        problem = "OPT with post-layer-norm or projected embeddings (opt-350m)"
    elif family == "gpt2" and config.add_cross_attention:
        problem = "GPT-2 with cross-attention"
    if problem is not None:
        names = ", ".join(FAMILIES.values())
        raise ModelError(f"{problem} is not covered. Covered: {names}. Load a model of one of these families.")
    return family


def _norm(module: Any) -> Norm:
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not isinstance(eps, float):
        raise ModelError(f"The norm {type(module).__name__} is not covered: it has no eps.")
    rms = not isinstance(module, torch.nn.LayerNorm)
    return Norm(_detached(module.weight), _detached(getattr(module, "bias", None)), eps, rms)


def _layer(bridge: Any, config: Any, index: int) -> Layer:
    block = bridge.blocks[index]
    attention = {name: _detached(getattr(block.attn, name, None)) for name in _ATTENTION_WEIGHTS}
    mlp = {name: _detached(getattr(block.mlp, name, None)) for name in _MLP_WEIGHTS}
    # W_in and friends are reported as [in, out] by the bridge; mlp.b_* are vectors everywhere.
    scale = attention["W_Q"].shape[-1] ** -0.5
    if config.model_type == "gpt2":
        scale = scale if config.scale_attn_weights else 1.0
        scale /= index + 1 if config.scale_attn_by_inverse_layer_idx else 1
    return Layer(
        norm_attention=_norm(block.ln1.original_component),
        norm_mlp=_norm(block.ln2.original_component),
        scale=scale,
        window=_window(config, index),
        **attention,
        **mlp,
    )


_ATTENTION_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP_WEIGHTS = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")


def _window(config: Any, index: int) -> int | None:
    """The sliding window of a layer's attention, or None."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    if config.model_type == "qwen2" and not config.use_sliding_window:
        return None
    return getattr(config, "sliding_window", None)


def _position_table(bridge: Any, config: Any) -> Float[Tensor, "C D"] | None:
    """Learned position embeddings from position 0 on (OPT's table starts two rows later), or None."""
    if not hasattr(bridge, "pos_embed"):
        return None
    table = _detached(bridge.pos_embed.original_component.weight)
    return table[2:] if config.model_type == "opt" else table


def _activation(config: Any) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    for key in ("hidden_act", "activation_function"):
        if getattr(config, key, None) is not None:
            return ACT2FN[getattr(config, key)]
    raise ModelError(f"The configuration of this {config.model_type} model names no MLP activation.")
