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

Where a norm follows the attention and the MLP (Gemma 2 and 3), what enters the residual stream is the *normed* sum of
the heads. A root-mean-square norm multiplies by one number per position, so a head's output is taken to be its share:
its own product with W_O, times the norm's gain, over the root mean square of the sum of all heads **as they are in
the run at hand**. The shares add up to what the model adds, so with every edge kept the logits are the model's own, and
cutting an edge takes exactly one share away from exactly one receiver. The price is that the heads of a layer are no
longer independent: what changes one of them changes the scale of all (`Network.together`), at that position.

Layers may lie on several devices (`load_model(..., device_map=...)`). What goes in and comes out is on the device of
the embedding, `Network.device`; each function computes where its layer's weights are.
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

from kcwb.errors import KcwbError, ModelError
from kcwb.models.families import ENCODERS, FAMILIES
from kcwb.models.graph import Graph
from kcwb.progress import cancel_point


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
        self.n_ctx: int = _context(cfg.n_ctx, config)
        self.graph = Graph(cfg.n_layers, cfg.n_heads, parallel=bool(cfg.parallel_attn_mlp))
        self.layers = [_layer(bridge, config, index) for index in range(cfg.n_layers)]
        #: Whether a norm follows the attention, so that the heads of a layer share a scale.
        self.post_norms: bool = any(layer.norm_heads is not None for layer in self.layers)
        #: Whether what one norm gives is normed again before it is used: queries and keys, or outputs.
        #: A bound on the logits, c tanh(x / c), or None.
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.W_E: Float[Tensor, "V D"] = _detached(bridge.embed.original_component.weight)
        self.W_U: Float[Tensor, "D V"] = _detached(bridge.unembed.original_component.weight).T
        self.norm_final = _norm(bridge.ln_final.original_component, self.W_U)
        self.b_U: Float[Tensor, " V"] | None = _detached(bridge.unembed.original_component.bias)
        if self.b_U is not None and not self.b_U.any():
            self.b_U = None
        self.d_vocab: int = self.W_U.shape[1]
        self.d_head: int = self.layers[0].W_Q.shape[2]
        self.n_kv_heads: int = self.layers[0].W_K.shape[0]
        self._positions = _position_table(bridge, config)
        self._embed_scale = getattr(bridge.embed.original_component, "embed_scale", None)
        self._rotary = _rotary(bridge, config)
        self._interleaved = self.family == "gptj"
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._activation = _activation(config)
        self._group = self.graph.n_heads // self.n_kv_heads

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_E.device

    @property
    def devices(self) -> list[torch.device]:
        """All devices that hold weights, in the order of the layers; the first is `device`."""
        weights = [self.W_E, *(layer.W_Q for layer in self.layers), self.norm_final.weight, self.W_U]
        return list(dict.fromkeys(weight.device for weight in weights))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type."""
        return self.W_E.dtype

    def require(self, what: str) -> None:
        """Raise ModelError if `what`, "roles" or "editing", is not defined on this family, or on several devices."""
        family = FAMILIES[self.family]
        words = {"roles": "What a head writes towards an answer", "editing": "Editing an MLP's down-projection"}
        if len(self.devices) > 1:
            raise ModelError(
                f"{words[what]} is not covered for a model on several devices ({', '.join(map(str, self.devices))}). "
                "Circuits of edges are. Load it on one device, without device_map."
            )
        if not getattr(family, what):
            raise ModelError(
                f"{words[what]} is not covered on {family.name}: {family.note}. Circuits of edges are; kcwb models "
                "lists what works on each family."
            )

    def embed(self, tokens: Int[Tensor, "... T"]) -> Float[Tensor, "... T D"]:
        """Token (scaled, in Gemma) plus learned position embedding: the output of the sender `input`."""
        x = F.embedding(tokens, self.W_E)
        if self._embed_scale is not None:
            x = x * self._embed_scale.to(x.dtype)
        return x if self._positions is None else x + self._positions[: tokens.shape[-1]].to(self.device)

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
        q = _project(weights.norm_attention(x.to(weights.device)), weights.W_Q, weights.b_Q, heads)
        q = q if weights.norm_query is None else weights.norm_query(q)
        return self._rotate(q.to(self.device), positions, weights.rope)

    def keys(
        self,
        layer: int,
        x: Float[Tensor, "h ... T D"],
        heads: Int[Tensor, " h"] | None = None,
        positions: Int[Tensor, "*N T"] | None = None,
    ) -> Float[Tensor, "h ... T K"]:
        """Keys, rotated like the queries; under grouped-query attention, one per query head."""
        weights = self.layers[layer]
        k = _project(weights.norm_attention(x.to(weights.device)), weights.W_K, weights.b_K, self._kv_heads(heads))
        k = k if weights.norm_key is None else weights.norm_key(k)
        return self._rotate(k.to(self.device), positions, weights.rope)

    def values(
        self, layer: int, x: Float[Tensor, "h ... T D"], heads: Int[Tensor, " h"] | None = None
    ) -> Float[Tensor, "h ... T K"]:
        """Values; under grouped-query attention, one per query head."""
        weights = self.layers[layer]
        v = _project(weights.norm_attention(x.to(weights.device)), weights.W_V, weights.b_V, self._kv_heads(heads))
        return v.to(self.device)

    def scores(
        self,
        layer: int,
        q: Float[Tensor, "h ... Q K"],
        k: Float[Tensor, "h ... T K"],
        positions: Int[Tensor, "*N Q"] | None = None,
    ) -> Float[Tensor, "h ... Q T"]:
        """Attention scores of queries at `positions` (default: 0..T-1) over keys at 0..T-1; -inf where hidden."""
        weights = self.layers[layer]
        if self.family in _FLOAT32_SCORES:
            q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        scores = _capped(q @ k.transpose(-1, -2) * weights.scale, weights.softcap)
        seen = torch.arange(k.shape[-2], device=k.device)
        at = seen if positions is None else positions
        hidden = seen > at[..., None]
        if weights.window is not None:
            hidden |= seen <= at[..., None] - weights.window
        return scores.masked_fill(hidden, -math.inf)

    def pattern(
        self,
        layer: int,
        q: Float[Tensor, "h ... Q K"],
        k: Float[Tensor, "h ... T K"],
        positions: Int[Tensor, "*N Q"] | None = None,
    ) -> Float[Tensor, "h ... Q T"]:
        """Attention probabilities: the softmax of `scores`."""
        return self.scores(layer, q, k, positions).softmax(-1).to(q.dtype)

    def head_outputs(
        self,
        layer: int,
        q: Float[Tensor, "h ... Q K"],
        k: Float[Tensor, "h ... T K"],
        v: Float[Tensor, "h ... T K"],
        heads: Int[Tensor, " h"] | None = None,
        positions: Int[Tensor, "*N Q"] | None = None,
    ) -> Float[Tensor, "h ... Q D"]:
        """What heads add to the residual stream, without the shared bias b_O.

        Raises
        ------
        KcwbError
            If only some `heads` are asked for where a norm follows the attention: their shares depend on the others
            (`head_results`, `head_shares`).
        """
        results = self.head_results(layer, q, k, v, heads, positions)
        if self.layers[layer].norm_heads is None:
            return results
        if heads is not None:
            raise KcwbError(f"In {FAMILIES[self.family].name} the heads of a layer share a norm: ask for all of them.")
        return self.head_shares(layer, results)

    def head_results(
        self,
        layer: int,
        q: Float[Tensor, "h ... Q K"],
        k: Float[Tensor, "h ... T K"],
        v: Float[Tensor, "h ... T K"],
        heads: Int[Tensor, " h"] | None = None,
        positions: Int[Tensor, "*N Q"] | None = None,
    ) -> Float[Tensor, "h ... Q D"]:
        """Heads' products with W_O: what they add, unless a norm follows, which reads their sum."""
        mixed, weights = self.pattern(layer, q, k, positions) @ v, self.layers[layer]
        return _project(mixed.to(weights.device), weights.W_O, None, heads).to(self.device)

    def head_shares(self, layer: int, results: Float[Tensor, "H ... D"]) -> Float[Tensor, "H ... D"]:
        """What all heads of a layer add, from their `head_results`: the same, or shares of the normed sum."""
        weights = self.layers[layer]
        if weights.norm_heads is None:
            return results
        return results * weights.norm_heads.factor(results.sum(0).to(weights.device)).to(self.device)

    def together(self, row: int) -> slice:
        """The senders whose outputs change when what a sender reads changes: itself, or all heads of its layer."""
        layer, place = divmod(row - 1, self.graph.n_heads + 1)
        if row == 0 or place == self.graph.n_heads or self.layers[layer].norm_heads is None:
            return slice(row, row + 1)
        return self.graph.head_senders(layer)

    def mlp(self, layer: int, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Output of an MLP, its bias included."""
        return self.mlp_output(layer, self._mlp_hidden(layer, x))

    def mlp_hidden(self, layer: int, x: Float[Tensor, "... D"]) -> Float[Tensor, "... M"]:
        """The MLP's hidden activations: the input of its down-projection."""
        return self._mlp_hidden(layer, x).to(self.device)

    def _mlp_hidden(self, layer: int, x: Float[Tensor, "... D"]) -> Float[Tensor, "... M"]:
        """The same, left where the layer is. Every pass comes by here once a layer, and can be cancelled."""
        cancel_point()
        weights = self.layers[layer]
        x = weights.norm_mlp(x.to(weights.device))
        hidden = _affine(x, weights.W_in, weights.b_in)
        if weights.W_gate is None:
            return self._activation(hidden)
        return self._activation(_affine(x, weights.W_gate, weights.b_gate)) * hidden

    def mlp_output(self, layer: int, hidden: Float[Tensor, "... M"]) -> Float[Tensor, "... D"]:
        """The MLP's down-projection, and the norm that follows it in some architectures."""
        weights = self.layers[layer]
        output = _affine(hidden.to(weights.device), weights.W_out, weights.b_out)
        output = output if weights.norm_mlp_output is None else weights.norm_mlp_output(output)
        return output.to(self.device)

    def logits(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits from the final residual stream."""
        x = self.norm_final(x.to(self.norm_final.weight.device)).to(self.W_U.device)
        return _capped(_affine(x, self.W_U, self.b_U), self.softcap).to(self.device)

    def logit_shares(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """What a part of the final residual stream adds to the logits; linear in `x`.

        That is before the final norm's scale and before a bound on the logits, which `logits_of_shares` applies.
        """
        norm = self.norm_final
        if not norm.rms:
            x = x - x.mean(-1, keepdim=True)
        x = (x.to(norm.weight.device) * norm.weight).to(self.W_U.device, self.dtype)
        return _affine(x, self.W_U, None).to(self.device)

    def logits_of_shares(self, shares: Float[Tensor, "... V"], x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits from the sum of all parts' `logit_shares` and the residual stream `x` that the parts add up to."""
        norm = self.norm_final
        wide = x.float()  # as the norms themselves do
        variance = wide.square().mean(-1, keepdim=True) if norm.rms else wide.var(-1, correction=0, keepdim=True)
        logits = shares * (variance + norm.eps).rsqrt().to(shares.dtype)
        if norm.bias is not None:
            logits = logits + _affine(norm.bias.to(self.W_U.device), self.W_U, None).to(self.device)
        return _capped(logits if self.b_U is None else logits + self.b_U.to(self.device), self.softcap)

    def constant(self, layer: int) -> Float[Tensor, " D"] | float:
        """What a layer's attention adds that belongs to no edge: its shared bias b_O (0.0 if there is none)."""
        bias = self.layers[layer].b_O
        return 0.0 if bias is None else bias.to(self.device)

    def _kv_heads(self, heads: Int[Tensor, " h"] | None) -> Int[Tensor, " h"] | None:
        if heads is None:
            if self._group == 1:
                return None
            heads = torch.arange(self.graph.n_heads, device=self.device)
        return heads.div(self._group, rounding_mode="floor")

    def _rotate(
        self, x: Float[Tensor, "h ... T K"], positions: Int[Tensor, "*N T"] | None, kind: str | None
    ) -> Float[Tensor, "h ... T K"]:
        """Rotary position embedding on the first channels (all of them, for Llama), as Hugging Face rotates.

        A channel turns with the one half the width away; in GPT-J, with its neighbour.
        """
        if self._rotary is None:
            return x
        cos, sin = self._rotary_tables(x, positions, kind)
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if self._interleaved:
            across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            across = torch.cat([-second, first], dim=-1)
        turned = turned * cos + across * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _rotary_tables(
        self, x: Float[Tensor, "h ... T K"], positions: Int[Tensor, "*N T"] | None, kind: str | None
    ) -> tuple[Float[Tensor, "*N T r"], Float[Tensor, "*N T r"]]:
        """Cosines and sines of positions, from Hugging Face's own module; kept, since every projection asks."""
        table = self._tables.get(kind)  # a name of our own: panels run a model on more than one thread
        if positions is None:
            needed = x.shape[-2]
        elif table is None or not positions.is_cuda:
            needed = int(positions.max()) + 1
        else:
            needed = 0  # on CUDA, looking would stall; a table too short fails there by itself
        if table is None or table[0].shape[0] < needed:
            assert self._rotary is not None  # asked only where the architecture rotates
            steps = torch.arange(needed, device=x.device)
            cos, sin = self._rotary(x.detach(), steps[None], *([] if kind is None else [kind]))
            table = self._tables[kind] = cos[0], sin[0]
        rows = slice(needed) if positions is None else positions
        return table[0][rows], table[1][rows]


def _project(
    x: Float[Tensor, "h ... I"], weight: Float[Tensor, "G I O"], bias: Tensor | None, heads: Tensor | None
) -> Float[Tensor, "h ... O"]:
    """One linear map per head, as a single batched product; `x` with head axis 1 is shared by all heads."""
    if heads is not None:
        heads = heads.to(weight.device)
        if x.shape[0] == 1 and len(heads) >= len(weight):  # key/value heads that several heads share: project once
            return _project(x, weight, bias, None)[heads]
        weight = weight[heads]
        bias = None if bias is None else bias[heads]
    n_heads, shape = weight.shape[0], x.shape[1:-1]
    flat = x.reshape(x.shape[0], -1, x.shape[-1]).expand(n_heads, -1, -1)
    out = torch.bmm(flat, weight) if bias is None else torch.baddbmm(bias[:, None], flat, weight)
    return out.reshape(n_heads, *shape, weight.shape[-1])


def _affine(x: Float[Tensor, "... I"], weight: Float[Tensor, "I O"], bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.T, bias)


def _capped(x: Tensor, bound: float | None) -> Tensor:
    """Bound to (-bound, bound), smoothly, as Gemma 2 does with attention scores and logits."""
    return x if bound is None else bound * torch.tanh(x / bound)


def _detached(weight: Tensor | None) -> Any:
    """A view of a weight without gradients: the same storage, so that an edit of the model is seen."""
    return None if weight is None else weight.detach()


def covered_family(config: Any) -> str:
    """The family of a Hugging Face configuration; ModelError if it, or an option of it, is not covered."""
    family = config.model_type
    if family in ENCODERS:
        raise ModelError(
            f"{ENCODERS[family].name} is an encoder with a norm after each sum: it has no residual stream that nodes "
            "add to, so edges, and circuits of them, are not defined. Ablate its nodes: load_encoder, "
            "make_masked_task, ablate_encoder."
        )
    problem = None
    if family not in FAMILIES:
        problem = f"architecture {family!r}"
    elif family == "opt" and (not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size):
        problem = "OPT with post-layer-norm or projected embeddings (opt-350m)"
    elif family == "opt" and config._remove_final_layer_norm:
        problem = "OPT without a final layer norm"
    elif family == "gpt2" and config.add_cross_attention:
        problem = "GPT-2 with cross-attention"
    elif family == "gpt2" and not config.scale_attn_weights:  # which the bridge scales all the same
        problem = "GPT-2 with unscaled attention"
    elif family == "gpt_neox" and not config.attention_bias:
        problem = "GPT-NeoX without attention biases"
    elif family == "phi" and config.qk_layernorm:
        problem = "Phi with query and key norms"
    elif family in ("gemma2", "gemma3_text") and config.attention_bias:
        problem = "Gemma 2 or 3 with attention biases"
    elif family == "gemma3_text" and config.attn_logit_softcapping is not None:  # Hugging Face's own code ignores it
        problem = "Gemma 3 with a bound on attention scores"
    elif getattr(config, "use_bidirectional_attention", None):
        problem = "a Gemma that reads in both directions (EmbeddingGemma)"
    if problem is not None:
        names = ", ".join(one.name for one in FAMILIES.values())
        raise ModelError(f"{problem} is not covered. Covered: {names}. Load a model of one of these families.")
    return family


def _norm(module: Any, like: Tensor) -> Norm:
    """A norm; `like` says device and precision of the gain of one that has none."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, (int, float)):
        raise ModelError(f"The norm {type(module).__name__} is not covered: it has no eps.")
    rms = not isinstance(module, torch.nn.LayerNorm)
    weight = _detached(module.weight)
    if weight is None:
        weight = like.new_ones(module.normalized_shape)
    if type(module).__name__.startswith("Gemma"):
        weight = 1.0 + weight.float()
    return Norm(weight, _detached(getattr(module, "bias", None)), eps, rms)


def _norm_of(bridge: Any, name: str, like: Tensor) -> Norm | None:
    """The norm of this name in a part of a bridge, or None."""
    return _norm(getattr(bridge, name).original_component, like) if name in dict(bridge.named_children()) else None


def _layer(bridge: Any, config: Any, index: int) -> Layer:
    block = bridge.blocks[index]
    attention = {name: _detached(getattr(block.attn, name, None)) for name in _ATTENTION_WEIGHTS}
    mlp = {name: _detached(getattr(block.mlp, name, None)) for name in _MLP_WEIGHTS}
    # W_in and friends are reported as [in, out] by the bridge; mlp.b_* are vectors everywhere.
    like = attention["W_Q"]
    norm = _norm(block.ln1.original_component, like)
    return Layer(
        norm_attention=norm,
        norm_mlp=_norm_of(block, "ln2", like) or norm,  # GPT-J and Phi read both through one
        scale=_scale(config, index, attention["W_Q"].shape[-1]),
        window=_window(config, index),
        softcap=getattr(config, "attn_logit_softcapping", None),
        rope=config.layer_types[index] if config.model_type == "gemma3_text" else None,
        norm_query=_norm_of(block.attn, "q_norm", like),
        norm_key=_norm_of(block.attn, "k_norm", like),
        norm_heads=_norm_of(block, "ln1_post", like),
        norm_mlp_output=_norm_of(block, "ln2_post", like),
        **attention,
        **mlp,
    )


def _scale(config: Any, index: int, d_head: int) -> float:
    """What a layer's attention scores are multiplied by."""
    scale = getattr(config, "query_pre_attn_scalar", d_head) ** -0.5
    if config.model_type == "gpt_neo":
        return 1.0
    if config.model_type == "gpt2":
        scale = scale if config.scale_attn_weights else 1.0
        scale /= index + 1 if config.scale_attn_by_inverse_layer_idx else 1
    return scale


#: Families whose attention scores Hugging Face computes in float32, whatever the precision of the weights.
_FLOAT32_SCORES = ("gptj", "gpt_neo")
_ATTENTION_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP_WEIGHTS = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")


def _window(config: Any, index: int) -> int | None:
    """The sliding window of a layer's attention, or None."""
    if config.model_type == "gpt_neo":
        return config.window_size if config.attention_layers[index] == "local" else None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    if config.model_type in ("qwen2", "qwen3") and not config.use_sliding_window:
        return None
    return getattr(config, "sliding_window", None)


def _position_table(bridge: Any, config: Any) -> Float[Tensor, "C D"] | None:
    """Learned position embeddings from position 0 on (OPT's table starts two rows later), or None."""
    if not hasattr(bridge, "pos_embed"):
        return None
    table = _detached(bridge.pos_embed.original_component.weight)
    return table[2:] if config.model_type == "opt" else table


def _rotary(bridge: Any, config: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Hugging Face's rotary module, (x, positions[, kind]) -> cosines, sines `[1, T, r]`; None where there is none."""
    if config.model_type == "gptj":  # keeps a table instead, of sines and then cosines
        table = bridge.blocks[0].attn.original_component.embed_positions

        def look_up(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            sin, cos = table.to(x.device, x.dtype)[positions].repeat_interleave(2, dim=-1).chunk(2, dim=-1)
            return cos, sin

        return look_up
    return bridge.rotary_emb.original_component if hasattr(bridge, "rotary_emb") else None


def _activation(config: Any) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    own = ("hidden_activation",) if config.model_type in ("gemma2", "gemma3_text") else ()  # Gemma 1 does not read it
    for key in (*own, "hidden_act", "activation_function"):
        if getattr(config, key, None) is not None:
            return ACT2FN[getattr(config, key)]
    raise ModelError(f"The configuration of this {config.model_type} model names no MLP activation.")


def _context(n_ctx: int, config: Any) -> int:
    """The longest prompt: what the model reads, or that up to which its rotation is the same for every length."""
    if n_ctx < 1:
        raise ModelError(f"The configuration of this {config.model_type} model says that it reads {n_ctx} tokens.")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return n_ctx
    return min(n_ctx, rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
