"""Direct logit attribution by source token: what each head writes towards an answer, split by where it read it.

The contribution of head h to token t through source position s, at END:

    c[h, s; t] = A[h, END, s] * (v[h, s] . W_O[h]) . u_t,    u_t = gain * (W_U[:, t] - mean_V W_U) / sigma

A is the head's attention, v its value without the bias b_V, W_U the unembedding, `gain` and sigma the final norm's
gain and the scale that it divides by in this very run; for a LayerNorm u_t is centred over the channels, which is what
its centring of the residual stream amounts to. Contributions are logits, measured from the mean over the vocabulary,
since a logit that all tokens gain decides nothing.

Where a norm follows the attention (Gemma 2 and 3), a head's output depends on the other heads of its layer, and what it
writes by itself is not defined without a choice: `attribute` refuses these families.

**It is exact.** The sum over sources, and b_V . W_O . u_t beside it, is the head's direct logit attribution; the sum
over all heads, MLPs and `input`, and the model's constants beside it, is the token's logit minus the mean logit.
(Elhage et al. 2021, transformer-circuits.pub/2021/framework; the split by source as in arXiv 2402.07321.)

Positions are summed in the groups of `kcwb.reading.positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import CircuitError
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.models.network import Network
from kcwb.reading.positions import GROUPS, check_prompts, position_groups, token_text, told_at_end
from kcwb.reading.trajectories import layer_streams
from kcwb.tasks.metrics import at_end
from kcwb.tasks.prompts import Prompts
from kcwb.verbs import verb


@dataclass(frozen=True, eq=False)
class Attribution:
    """What every head writes at END towards some tokens, by source; made by `attribute`.

    Attributes
    ----------
    by_source
        `[L, H, N, T, t]`: the contribution (logits) through each source position; 0 after END.
    bias
        `[L, H, N, t]`: that of the value bias, which comes from no position.
    attention
        `[L, H, N, T]`: the attention from END.
    mixed
        `[L, H, N, K]`: the attended values, b_V included; times W_O they are the heads' outputs at END.
    scale
        `[N]`: what the final norm divides by at END.
    """

    by_source: Float[Tensor, "L H N T t"]
    bias: Float[Tensor, "L H N t"]
    attention: Float[Tensor, "L H N T"]
    mixed: Float[Tensor, "L H N K"]
    scale: Float[Tensor, " N"]

    @property
    def total(self) -> Float[Tensor, "L H N t"]:
        """Every head's direct logit attribution."""
        return self.by_source.sum(-2) + self.bias

    def by_group(self, groups: Bool[Tensor, "g N T"]) -> Float[Tensor, "g L H N t"]:
        """Contributions summed over groups of positions, see `position_groups`."""
        return torch.einsum("lhnst,gns->glhnt", self.by_source, groups.to(self.by_source.dtype))


@torch.no_grad()
def attribute(model: Model, prompts: Prompts, targets: Int[Tensor, "N t"] | None = None) -> Attribution:
    """Attribute the logits of some tokens to all heads and source positions, in the full model.

    Parameters
    ----------
    prompts
        What it is asked.
    targets
        `[N, t]`: the tokens of interest of each prompt. Default: the first token of its answer, `t` = 1.

    Returns
    -------
    Attribution
        In float32 (float64 for a float64 model), on the model's device.
    """
    model.network.require("roles")
    targets = prompts.answers[:, :1] if targets is None else targets

    def work(rows: slice) -> tuple[Tensor, ...]:
        return _attribute_chunk(model.network, prompts.select(rows), targets[rows], prompts.tokens.shape[1])

    *by_head, scale = zip(*by_prompts(model.network, prompts.tokens, work, copies=1), strict=True)
    by_source, bias, attention, mixed = (torch.cat(field, dim=2) for field in by_head)
    return Attribution(by_source, bias, attention, mixed, torch.cat(scale))


def _attribute_chunk(network: Network, prompts: Prompts, targets: Int[Tensor, "N t"], width: int) -> tuple[Tensor, ...]:
    """The fields of an Attribution, its source axis padded to `width`."""
    *streams, final = layer_streams(network, prompts.tokens)
    scale = final_scale(network, at_end(final, prompts))
    directions = token_directions(network, targets) / scale[:, None, None]
    fields = []
    for layer, x in enumerate(streams):
        attention = _wide(attention_at_end(network, layer, x, prompts))
        values = _wide(network.values(layer, x[None]))
        bias = value_bias(network, layer)
        mixed = torch.einsum("hns,hnsk->hnk", attention, values)
        written = torch.einsum("ntd,hkd->hntk", directions, _wide(network.layers[layer].W_O))
        along = torch.einsum("hnsk,hntk->hnst", values - bias[:, None, None], written)
        pad = width - attention.shape[-1]
        by_source = torch.nn.functional.pad(attention[..., None] * along, (0, 0, 0, pad))
        of_bias = torch.einsum("hk,hntk->hnt", bias, written)
        fields.append((by_source, of_bias, torch.nn.functional.pad(attention, (0, pad)), mixed))
    return *map(torch.stack, zip(*fields, strict=True)), scale


def attention_at_end(
    network: Network, layer: int, x: Float[Tensor, "N T D"], prompts: Prompts
) -> Float[Tensor, "H N T"]:
    """Every head's attention from END, from the residual stream before its layer."""
    places = prompts.ends[:, None]
    queries = network.queries(layer, at_end(x, prompts)[None, :, None], positions=places)
    return network.pattern(layer, queries, network.keys(layer, x[None]), places)[:, :, 0]


def final_scale(network: Network, residual: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
    """What the final norm divides a residual stream by."""
    residual = _wide(residual)
    if not network.norm_final.rms:
        residual = residual - residual.mean(-1, keepdim=True)
    return (residual.square().mean(-1) + network.norm_final.eps).sqrt()


def token_directions(network: Network, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """The directions that raise tokens' logits above the mean logit, the final norm's gain and centring folded in.

    For a residual stream x, `x . direction / final_scale(x)` is a token's logit minus the mean over the vocabulary,
    but for the constants (the final norm's bias and the unembedding's).
    """
    directions = _wide(network.W_U.T[tokens]) - _wide(network.W_U.mean(1))
    directions = directions * _wide(network.norm_final.weight)
    return directions if network.norm_final.rms else directions - directions.mean(-1, keepdim=True)


def value_bias(network: Network, layer: int) -> Float[Tensor, "H K"]:
    """The value bias of each query head; zeros where there is none."""
    weights = network.layers[layer]
    if weights.b_V is None:
        return _wide(weights.W_Q.new_zeros(network.graph.n_heads, network.d_head))
    return _wide(weights.b_V).repeat_interleave(network.graph.n_heads // network.n_kv_heads, 0)


def head_outputs(network: Network, found: Attribution) -> Float[Tensor, "L H N D"]:
    """What every head writes at END, through W_O and without b_O, in the run's own units."""
    pairs = zip(found.mixed, network.layers, strict=True)
    return torch.stack([torch.einsum("hnk,hkd->hnd", mixed, _wide(weights.W_O)) for mixed, weights in pairs])


@torch.no_grad()
def top_tokens(model: Model, written: Float[Tensor, "h D"], n: int) -> list[str]:
    """The n tokens that each output raises most above the mean logit, as one text."""
    every = torch.arange(model.network.d_vocab, device=written.device)
    best = (written @ token_directions(model.network, every).T).topk(min(n, len(every))).indices.tolist()
    return [" | ".join(token_text(model, token).strip() for token in tokens) for tokens in best]


class _Head(NamedTuple):
    node: str
    layer: int
    head: int


def named_heads(model: Model, nodes: Sequence[str]) -> list[_Head]:
    """The places of heads by name; CircuitError for a name that is not a head's."""
    found = []
    for name in nodes:
        place = model.graph.node(name)
        if place.kind != "head":
            raise CircuitError(f"{name!r} is not an attention head; heads are named a<layer>.h<head>.")
        found.append(_Head(name, place.layer, place.head))
    return found


@verb
def dla_by_source(model: Model, prompts: Prompts, heads: Sequence[str]) -> pd.DataFrame:
    """The direct logit attribution of some heads to each prompt's answer, token by token.

    Parameters
    ----------
    model, prompts
        The full model is run; the answer's first token is what is attributed. A fact whose object shares it with
        another object of the relation is left out with a warning.
    heads
        Names such as `a14.h7`.

    Returns
    -------
    DataFrame
        One row per prompt, head and source: `subject`, `object`, `node`, `position`, `token` (its text), `group` (one
        of `GROUPS`), `attention` from END, `contribution` (logits). A row with the group `bias` (no position, NaN
        attention) holds what comes from no token; with it, a head's contributions sum to its attribution.

    Raises
    ------
    CircuitError
        If a name is not a head's.
    DataError
        If a subject has no token before END.
    """
    wanted = named_heads(model, heads)
    check_prompts(prompts)
    prompts = told_at_end(prompts)
    found = attribute(model, prompts)
    groups = position_groups(prompts).int().argmax(0).tolist()
    rows = []
    for n, fact in enumerate(prompts.facts):
        tokens = prompts.tokens[n, : int(prompts.lengths[n])].tolist()
        words = [token_text(model, token) for token in tokens]
        for head in wanted:
            about = (fact.subject, fact.object, head.node)
            attention = found.attention[head.layer, head.head, n].tolist()
            values = found.by_source[head.layer, head.head, n, :, 0].tolist()
            for s, word in enumerate(words):
                rows.append((*about, s, word, GROUPS[groups[n][s]], attention[s], values[s]))
            rows.append((*about, None, "", "bias", None, float(found.bias[head.layer, head.head, n, 0])))
    columns = ["subject", "object", "node", "position", "token", "group", "attention", "contribution"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"position": "Int64", "attention": float, "contribution": float})


def _wide(x: Tensor) -> Tensor:
    """At least float32: what is summed over sources must not lose more than rounding."""
    return x if x.dtype == torch.float64 else x.float()
