"""What must hold before any result of a model is believed; run when it is loaded.

Every node is given what it reads in a run of the Hugging Face model's own code (`kcwb.models.reference`), on random
tokens, and must compute what it computes there:

1. `input`: the embedding; each head: its attention scores, and its output; each layer: what its heads and their shared
   bias add together; each MLP: its output; the unembedding: the logits.

So an error is not drowned in the sum of all others, and its place is known. And the nodes must be put together aright:

2. The residual stream before the unembedding is the sum of all senders and constants.
3. With every edge kept, in the plain and in the masked pass, every node reads what it reads in the Hugging Face model;
   as it computes there what it should, the logits are the Hugging Face model's own.
4. With every edge cut under resample ablation, every node reads what it reads in the corrupted run, so that the logits
   are those of that run.

A difference is the norm of the error at a position over the norm of what is right there, or over the median of that
norm over positions where it is larger; for a sum, over the norm of its parts where that is larger. The largest over
positions counts. So neither the huge stream of the first position (SmolLM2's is 5,675 there and 15 elsewhere) hides the
others, nor does a position where a node does next to nothing count for much.

In float32 a difference may be 1e-4. In half precision it is taken from a float32 run of the same weights, and may be
three times what the same precision costs Hugging Face's own code, measured the same way, plus twice the spacing of
numbers at 1. A float32 difference above 1e-4 is judged in that way too, beside float64. Beyond its bound the model is
refused; so it is where anything is not finite.

In float32 an error of 1% of a typical entry is found in any one head or MLP. In half precision it is of the size of
rounding. Of 312 such errors in tiny models of six architectures float16 missed 24 (all but one in what a head adds) and
bfloat16 303; errors in kind (heads swapped, a bias, a norm's gain, a window, a rotary embedding left out) are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.errors import ModelError
from kcwb.models.forward import forward
from kcwb.models.network import Network
from kcwb.models.reference import Run, output_weights, reference_run
from kcwb.versions import versions

_LENGTH = 8
_FLOAT32 = 1e-4
_TIMES = 3.0

Pick = Callable[[Run], Float[Tensor, "U N T X"]]


class _Claim(NamedTuple):
    """That some nodes of ours give, at every position, what `pick` takes from a run of the Hugging Face model."""

    check: str
    nodes: tuple[str, ...]
    ours: Float[Tensor, "U N T X"]
    pick: Pick
    parts: Float[Tensor, "U N T"] | None = None  # the norm of what is summed, for a sum


@torch.no_grad()
def self_check(bridge: Any, network: Network, name: str) -> dict[str, float]:
    """Check that functions of nodes compute what the model in a TransformerBridge computes.

    Returns check -> its largest difference. ModelError if one exceeds its bound (or is not a number); it names model,
    check, node, difference and bound.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(network.W_E.shape[0], network.d_vocab)
    shape = (2, min(_LENGTH, network.n_ctx))
    tokens = torch.randint(vocabulary, shape, generator=generator).to(network.device)
    own = reference_run(bridge, tokens)
    senders, found = [], {}

    narrow = network.dtype.itemsize == 2 or network.device.type == "mps"  # which has no float64
    wide = torch.float32 if narrow else torch.float64
    exact = cache(lambda: reference_run(bridge, tokens, wide=wide, like=own))
    exact_free = cache(lambda: reference_run(bridge, tokens, wide=wide))
    for claim in _node_claims(bridge, network, tokens, own, senders):
        _hold(claim, own, exact, network, name, found)
    for claim in _joint_claims(network, tokens, torch.cat(senders)):
        _hold(claim, own, exact_free, network, name, found)
    return found


def _node_claims(
    bridge: Any, network: Network, tokens: Int[Tensor, "N T"], own: Run, senders: list[Tensor]
) -> Iterator[_Claim]:
    """What each node computes from the stream of a Hugging Face run; and fill `senders`, `[s, N, 1, D]` each.

    MLPs and the unembedding work on each position apart; the last one of each prompt stands for all.
    """
    graph, device = network.graph, network.device
    lowest = torch.finfo(network.dtype).min / 2  # Hugging Face masks scores with huge negative numbers
    embedded = network.embed(tokens)[None]
    senders.append(embedded[:, :, -1:])
    yield _Claim("embedding", ("input",), embedded, lambda run: run.layers[0].before[None])
    for layer, one in enumerate(own.layers):
        heads = tuple(graph.sender_names[graph.head_senders(layer)])
        x = one.before.to(device)[None]
        q, k, v = network.queries(layer, x), network.keys(layer, x), network.values(layer, x)
        scores = network.scores(layer, q, k)
        masked = scores.isneginf() & (one.scores.transpose(0, 1).to(device) <= lowest)

        def seen(run: Run, layer: int = layer, masked: Tensor = masked) -> Tensor:
            return run.layers[layer].scores.transpose(0, 1).to(device).masked_fill(masked, 0.0)

        yield _Claim("attention scores", heads, scores.masked_fill(masked, 0.0), seen)

        outputs = network.head_outputs(layer, q, k, v)
        results = outputs if network.layers[layer].norm_heads is None else network.head_results(layer, q, k, v)
        weights = output_weights(bridge.blocks[layer], graph.n_heads)

        def product(run: Run, layer: int = layer, weights: Tensor = weights) -> Tensor:
            mixed = run.layers[layer].mixed.unflatten(-1, weights.shape[:2])
            kind = torch.promote_types(mixed.dtype, torch.float32)
            return torch.einsum("nthk,hkd->hntd", mixed.to(kind), weights.to(kind))

        yield _Claim("head outputs", heads, results, product)
        yield _Claim(
            "attention as a whole",
            (f"a{layer}",),
            (outputs.sum(0) + network.constant(layer))[None],
            lambda run, layer=layer: run.layers[layer].attention[None],
            _norm_of_parts(outputs),
        )
        mlp = network.mlp(layer, one.between[:, -1:].to(device))[None]
        yield _Claim("MLP outputs", (f"m{layer}",), mlp, lambda run, layer=layer: run.layers[layer].mlp[None, :, -1:])
        senders += [outputs[:, :, -1:], mlp]
    logits = network.logits(own.final[:, -1:].to(device))[None]
    yield _Claim("unembedding", ("logits",), logits, lambda run: run.logits[None])


def _joint_claims(network: Network, tokens: Int[Tensor, "2 T"], senders: Float[Tensor, "S 2 1 D"]) -> Iterator[_Claim]:
    """The sum of all nodes, and what each reads at the end of the first of two prompts; the other is the corrupted."""
    graph = network.graph
    yield _Claim(
        "residual stream = sum of senders",
        ("logits",),
        (senders.sum(0) + sum(network.constant(layer) for layer in range(graph.n_layers)))[None],
        lambda run: run.final[None, :, -1:],
        _norm_of_parts(senders),
    )
    clean, corrupted = (senders[:, i : i + 1].contiguous() for i in (0, 1))
    kept = graph.exists.to(network.device)
    readers = torch.tensor([3 * graph.n_heads, 1] * graph.n_layers + [1], device=network.device)
    replay: Any = _Replay(network, clean)
    for check, row, mask, ablated in (
        ("plain pass = Hugging Face's stream", 0, None, None),
        ("all edges kept = Hugging Face's stream", 0, kept, corrupted),
        ("all edges cut under resample = corrupted run", 1, torch.zeros_like(kept), corrupted),
    ):
        run = forward(replay, tokens[:1, -1:], kept=mask, ablated=ablated, receivers=True)
        read = [part for x, y in run.receivers for part in (x, y[None])]

        def streams(reference: Run, row: int = row) -> Tensor:
            found = [stream for one in reference.layers for stream in (one.before, one.between)] + [reference.final]
            last = torch.stack([stream[row : row + 1, -1:].to(network.device) for stream in found])
            return last.repeat_interleave(readers, dim=0)

        yield _Claim(check, graph.receiver_names, torch.cat([*read, run.residual[None]]), streams)


class _Replay:
    """Stands in for a Network in `forward`: nodes write what is recorded that they write, whatever they read."""

    def __init__(self, network: Network, senders: Float[Tensor, "S N T D"]) -> None:
        self.graph, self.constant, self._senders = network.graph, network.constant, senders

    def embed(self, tokens: Tensor) -> Tensor:
        return self._senders[0]

    def queries(self, layer: int, x: Tensor) -> Tensor:
        return x

    keys = values = queries

    def head_outputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._senders[self.graph.head_senders(layer)]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        return self._senders[self.graph.mlp_sender(layer)]


def _norm_of_parts(parts: Float[Tensor, "s N T D"]) -> Float[Tensor, "1 N T"]:
    return parts.float().norm(dim=-1).norm(dim=0)[None]


def _hold(
    claim: _Claim, own: Run, exact: Callable[[], Run], network: Network, name: str, found: dict[str, float]
) -> None:
    """Note a claim's largest difference, or raise ModelError if one of its nodes exceeds its bound."""
    theirs, half = claim.pick(own), network.dtype.itemsize == 2
    differences = _differences(claim.ours, theirs, claim.parts)
    if half or not float(differences.max()) <= _FLOAT32:
        failed, precision = f"{name} failed its self-check '{claim.check}'", str(network.dtype).removeprefix("torch.")
        if not bool(theirs.isfinite().all()):
            remedy = "with dtype='bfloat16' or 'float32'" if precision == "float16" else "from weights that are whole"
            raise ModelError(
                f"{failed}: what Hugging Face itself computes in {precision} is not finite, in {claim.nodes[0]} or "
                f"beside it. Load it {remedy}."
            )
        right = claim.pick(exact())
        differences = _differences(claim.ours, right, claim.parts)
        bounds = _TIMES * _differences(theirs, right, claim.parts)
        bounds += 2 * torch.finfo(network.dtype).eps if half else _FLOAT32
        for node, difference, bound in zip(claim.nodes, differences.tolist(), bounds.tolist(), strict=True):
            if not difference <= bound:
                used = ", ".join(f"{package} {version}" for package, version in versions().items())
                raise ModelError(
                    f"{failed} at {node}: difference {difference:.2g}, allowed {bound:.2g} in {precision}. Results on "
                    f"this model would be wrong, so it is refused{'; try float32' * half}. Please report its "
                    f"architecture ({network.family}) and these versions: {used}."
                )
    found[claim.check] = max(found.get(claim.check, 0.0), float(differences.max()))


def _differences(
    ours: Float[Tensor, "U N T X"], theirs: Float[Tensor, "U N T X"], parts: Float[Tensor, "U N T"] | None
) -> Float[Tensor, " U"]:
    """Each node's largest difference over positions, as the module's docstring defines it."""
    kind = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    right = theirs.to(ours.device, kind)
    error, size = ((x.norm(dim=-1).flatten(1)) for x in (ours.to(kind) - right, right))
    typical = size.where(size > 0, torch.nan).nanmedian(dim=1, keepdim=True).values.nan_to_num()
    size = size.maximum(typical)
    if parts is not None:
        size = size.maximum(parts.flatten(1).to(kind))
    return torch.where(error == 0, 0.0, error / size).amax(dim=1)
