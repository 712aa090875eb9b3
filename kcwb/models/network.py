"""The transformer as functions of its nodes; what differs between architectures is in `kcwb.models.families`.

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

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.errors import KcwbError, ModelError
from kcwb.models.families import FAMILIES, covered_family
from kcwb.models.graph import Graph
from kcwb.models.rules import TRUE, Rules, share
from kcwb.models.weights import (
    Norm,
    added_to_last,
    detached,
    read_activation,
    read_context,
    read_layer,
    read_norm,
    read_positions,
)
from kcwb.progress import cancel_point

#: What receivers read, and what each head makes of it; `Q` and `T` are positions of queries and of keys.
Read = Float[Tensor, "h ... T D"]
Queries = Float[Tensor, "h ... Q K"]
Keys = Values = Float[Tensor, "h ... T K"]
#: Which heads of a layer; None for all of them.
Heads = Int[Tensor, " h"] | None
#: Where in the prompts, for all alike `[T]` or each prompt's own `[N, T]`; None for 0..T-1.
Positions = Int[Tensor, "*N T"] | None


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
        config, cfg = bridge.original_model.config, bridge.cfg
        #: The `model_type` of its family.
        self.family: str = covered_family(config)
        self._about = about = FAMILIES[self.family]
        self.d_model: int = cfg.d_model
        self.n_ctx: int = read_context(cfg.n_ctx, config)
        self.graph = Graph(cfg.n_layers, cfg.n_heads, parallel=bool(cfg.parallel_attn_mlp))
        self.layers = [read_layer(bridge, about, index) for index in range(cfg.n_layers)]
        #: Whether a norm follows the attention, so that the heads of a layer share a scale.
        self.post_norms: bool = any(layer.norm_heads is not None for layer in self.layers)
        #: A bound on the logits, c tanh(x / c), or None.
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        embed, unembed = bridge.embed.original_component, bridge.unembed.original_component
        self.W_E: Float[Tensor, "V D"] = detached(embed.weight)
        self.W_U: Float[Tensor, "D V"] = detached(unembed.weight).T
        self.norm_final = read_norm(bridge.ln_final.original_component, self.W_U, about)
        bias = detached(unembed.bias)
        self.b_U: Float[Tensor, " V"] | None = None if bias is None or not bias.any() else bias
        self.d_vocab: int = self.W_U.shape[1]
        self.d_head: int = self.layers[0].W_Q.shape[2]
        self.n_kv_heads: int = self.layers[0].W_K.shape[0]
        self._positions = read_positions(bridge, about)
        self._embed_scale = getattr(embed, "embed_scale", None)
        self._rotary = about.rotary(bridge)
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._activation = read_activation(config, about)
        self._group = self.graph.n_heads // self.n_kv_heads
        self._rules = TRUE

    def under(self, rules: Rules) -> Network:
        """The same network, whose backward pass follows some rules."""
        other = copy.copy(self)
        other._rules = rules
        return other

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
        family = self._about
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

    def queries(self, layer: int, x: Read, heads: Heads = None, positions: Positions = None) -> Queries:
        """Queries of `heads` at `positions`, rotated, where the architecture does."""
        weights = self.layers[layer]
        q = _project(self._normed(weights.norm_attention, x, weights.device), weights.W_Q, weights.b_Q, heads)
        q = q if weights.norm_query is None else self._rules.norm(weights.norm_query, q)
        return self._rotate(share(q.to(self.device), self._rules.queries_keys), positions, weights.rope)

    def keys(self, layer: int, x: Read, heads: Heads = None, positions: Positions = None) -> Keys:
        """Keys, rotated like the queries; under grouped-query attention, one per query head."""
        weights = self.layers[layer]
        normed = self._normed(weights.norm_attention, x, weights.device)
        k = _project(normed, weights.W_K, weights.b_K, self._kv_heads(heads))
        k = k if weights.norm_key is None else self._rules.norm(weights.norm_key, k)
        return self._rotate(share(k.to(self.device), self._rules.queries_keys), positions, weights.rope)

    def values(self, layer: int, x: Read, heads: Heads = None) -> Values:
        """Values; under grouped-query attention, one per query head."""
        weights = self.layers[layer]
        normed = self._normed(weights.norm_attention, x, weights.device)
        v = _project(normed, weights.W_V, weights.b_V, self._kv_heads(heads))
        return share(v.to(self.device), self._rules.values)

    def query_parts(
        self, layer: int, parts: Float[Tensor, "h P *N Q D"], heads: Heads = None, positions: Positions = None
    ) -> Float[Tensor, "h P *N Q K"]:
        """What each of some parts, which add up to what queries read, adds to the queries.

        Exact where the scales of norms are held at what they are on the sum. Biases, which no part brings, count for
        the last one. At least in float32.
        """
        weights = self.layers[layer]
        return self._parts(layer, parts, weights.W_Q, weights.b_Q, weights.norm_query, heads, positions)

    def key_parts(
        self, layer: int, parts: Float[Tensor, "h P *N T D"], heads: Heads = None, positions: Positions = None
    ) -> Float[Tensor, "h P *N T K"]:
        """The same of keys."""
        weights, heads = self.layers[layer], self._kv_heads(heads)
        return self._parts(layer, parts, weights.W_K, weights.b_K, weights.norm_key, heads, positions)

    def _parts(
        self, layer: int, parts: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, heads: Heads,
        positions: Positions,
    ) -> Tensor:  # fmt: skip
        weights = self.layers[layer]
        read = weights.norm_attention.shares(parts.to(weights.device))
        made = _project(read, weight.to(read.dtype), None, heads)
        if bias is not None:
            of_heads = bias if heads is None else bias[heads.to(bias.device)]
            made = added_to_last(made, of_heads.reshape(len(made), *[1] * (made.ndim - 3), -1))
        made = made if norm is None else norm.shares(made)
        return self._rotate(made.to(self.device), positions, weights.rope)

    def scores(self, layer: int, q: Queries, k: Keys, positions: Positions = None) -> Float[Tensor, "h ... Q T"]:
        """Attention scores of queries at `positions` over keys at 0..T-1; -inf where hidden."""
        weights = self.layers[layer]
        if self._about.float32_scores:
            q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        scores = _capped(q @ k.transpose(-1, -2) * weights.scale, weights.softcap)
        seen = torch.arange(k.shape[-2], device=k.device)
        at = seen if positions is None else positions
        hidden = seen > at[..., None]
        if weights.window is not None:
            hidden |= seen <= at[..., None] - weights.window
        return scores.masked_fill(hidden, -math.inf)

    def pattern(self, layer: int, q: Queries, k: Keys, positions: Positions = None) -> Float[Tensor, "h ... Q T"]:
        """Attention probabilities: the softmax of `scores`."""
        return self._rules.softmax(self.scores(layer, q, k, positions)).to(q.dtype)

    def head_outputs(
        self, layer: int, q: Queries, k: Keys, v: Values, heads: Heads = None, positions: Positions = None
    ) -> Float[Tensor, "h ... Q D"]:
        """What heads add to the residual stream, without the shared bias b_O.

        KcwbError if only some `heads` are asked for where a norm follows the attention: their shares depend on the
        others (`head_results`, `head_shares`).
        """
        results = self.head_results(layer, q, k, v, heads, positions)
        if heads is not None and self.layers[layer].norm_heads is not None:
            raise KcwbError(f"In {self._about.name} the heads of a layer share a norm: ask for all of them.")
        return self.head_shares(layer, results)

    def head_results(
        self, layer: int, q: Queries, k: Keys, v: Values, heads: Heads = None, positions: Positions = None
    ) -> Float[Tensor, "h ... Q D"]:
        """Heads' products with W_O: what they add, unless a norm follows, which reads their sum."""
        mixed, weights = self.pattern(layer, q, k, positions) @ v, self.layers[layer]
        return _project(mixed.to(weights.device), weights.W_O, None, heads).to(self.device)

    def head_shares(self, layer: int, results: Float[Tensor, "H ... D"]) -> Float[Tensor, "H ... D"]:
        """What all heads of a layer add, from their `head_results`: the same, or shares of the normed sum."""
        weights = self.layers[layer]
        if weights.norm_heads is None:
            return results
        return results * self._rules.norm_factor(weights.norm_heads, results.sum(0).to(weights.device)).to(self.device)

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
        x, rules = self._normed(weights.norm_mlp, x, weights.device), self._rules
        hidden = _affine(x, weights.W_in, weights.b_in)
        if weights.W_gate is None:
            return rules.activation(self._activation, hidden)
        gate = rules.activation(self._activation, _affine(x, weights.W_gate, weights.b_gate))
        return share(gate, rules.factors) * share(hidden, rules.factors)

    def mlp_output(self, layer: int, hidden: Float[Tensor, "... M"]) -> Float[Tensor, "... D"]:
        """The MLP's down-projection, and the norm that follows it in some architectures."""
        weights = self.layers[layer]
        output = _affine(hidden.to(weights.device), weights.W_out, weights.b_out)
        output = output if weights.norm_mlp_output is None else self._rules.norm(weights.norm_mlp_output, output)
        return output.to(self.device)

    def logits(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits from the final residual stream."""
        x = self._normed(self.norm_final, x, self.norm_final.weight.device).to(self.W_U.device)
        return _capped(_affine(x, self.W_U, self.b_U), self.softcap).to(self.device)

    def _normed(self, norm: Norm, x: Float[Tensor, "... D"], device: torch.device) -> Float[Tensor, "... D"]:
        return self._rules.norm(norm, x.to(device))

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

    def _kv_heads(self, heads: Heads) -> Heads:
        if heads is None:
            if self._group == 1:
                return None
            heads = torch.arange(self.graph.n_heads, device=self.device)
        return heads.div(self._group, rounding_mode="floor")

    def _rotate(self, x: Keys, positions: Positions, kind: str | None) -> Keys:
        """Rotary position embedding on the first channels (all of them, for Llama), as Hugging Face rotates.

        A channel turns with the one half the width away; in GPT-J, with its neighbour.
        """
        if self._rotary is None:
            return x
        cos, sin = self._rotary_tables(x, positions, kind)
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if self._about.interleaved:
            across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            across = torch.cat([-second, first], dim=-1)
        turned = turned * cos + across * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _rotary_tables(
        self, x: Keys, positions: Positions, kind: str | None
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
            cos, sin = self._rotary(x.detach().to(self.dtype), steps[None], *([] if kind is None else [kind]))
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
