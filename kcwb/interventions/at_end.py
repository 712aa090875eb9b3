"""END without a head, or with another prompt's: what becomes of the logits there, for many heads at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.models.forward import forward
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.reading.dla import attribute, head_outputs
from kcwb.tasks.prompts import Prompts

#: Rows (heads x prompts x positions) that a batch of ablated heads may take, and bytes of logits.
_ROWS, _LOGIT_BYTES = 2**15, 2**27


def at_end(x: Float[Tensor, "*any N T D"], prompts: Prompts) -> Float[Tensor, "*any N D"]:
    """What is at each prompt's END."""
    return x[..., torch.arange(len(prompts), device=x.device), prompts.ends, :]


@torch.no_grad()
def logits_without(
    model: Model, prompts: Prompts, heads: Sequence[tuple[int, int]]
) -> Iterator[Float[Tensor, "c N V"]]:
    """Logits at END with the output of each (layer, head) in turn set to zero at END; heads come in batches, in order.

    Where a norm follows the attention, what is taken away is the head's share of the normed sum.

    Only END changes, and nothing after END is read. So keys and values of all other positions are those of one clean
    run, and each head's run begins at its own layer.
    """
    network = model.network
    places, rows = prompts.ends[:, None], torch.arange(len(prompts), device=model.device)
    clean = forward(network, prompts.tokens, receivers=True)
    assert clean.receivers is not None  # asked for in the line above
    streams = [x[:1] for x, _ in clean.receivers]
    keys = [network.keys(layer, x) for layer, x in enumerate(streams)]
    values = [network.values(layer, x) for layer, x in enumerate(streams)]
    size = max(1, _ROWS // prompts.tokens.numel())
    for start in range(0, len(heads), size):
        batch = heads[start : start + size]
        order = sorted(range(len(batch)), key=lambda i: batch[i][0])
        x = streams[0].new_empty(0, len(prompts), network.d_model)
        for layer in range(network.graph.n_layers):
            born = [batch[i][1] for i in order if batch[i][0] == layer]
            if len(x) or born:
                before = torch.cat([x, streams[layer][0][rows, prompts.ends].expand(len(born), -1, -1)])
                at = before[None, :, :, None]
                k = _with_end(keys[layer], network.keys(layer, at, positions=places), prompts)
                v = _with_end(values[layer], network.values(layer, at), prompts)
                q = network.queries(layer, at, positions=places)
                out = network.head_outputs(layer, q, k, v, positions=places)[:, :, :, 0]
                for i, head in enumerate(born, start=len(x)):
                    out[head, i] = 0.0
                x = _after(network, layer, before, out.sum(0) + network.constant(layer))
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=x.device)
        step = max(1, _LOGIT_BYTES // (len(prompts) * network.d_vocab * 4))
        for part in x[back].split(step):
            yield network.logits(part).float()


@torch.no_grad()
def logits_with(
    model: Model, prompts: Prompts, outputs: Float[Tensor, "L H N D"], sets: Bool[Tensor, "s L H"]
) -> Iterator[Float[Tensor, "c N V"]]:
    """Logits at END when each set's heads write `outputs` there instead of their own; sets come in batches, in order.

    As in `logits_without` only END is run, here from the first layer on in which any head is replaced.
    """
    network = model.network
    places, rows = prompts.ends[:, None], torch.arange(len(prompts), device=model.device)
    clean = forward(network, prompts.tokens, receivers=True)
    assert clean.receivers is not None  # asked for in the line above
    streams = [x[:1] for x, _ in clean.receivers]
    first = int(sets.any(0).any(-1).int().argmax())
    keys = {layer: network.keys(layer, streams[layer]) for layer in range(first, len(streams))}
    values = {layer: network.values(layer, streams[layer]) for layer in keys}
    step = max(1, _LOGIT_BYTES // (len(prompts) * network.d_vocab * 4))
    for batch in sets.to(model.device).split(max(1, _ROWS // prompts.tokens.numel())):
        x = streams[first][0][rows, prompts.ends].expand(len(batch), -1, -1)
        for layer in keys:
            at = x[None, :, :, None]
            k = _with_end(keys[layer], network.keys(layer, at, positions=places), prompts)
            v = _with_end(values[layer], network.values(layer, at), prompts)
            q = network.queries(layer, at, positions=places)
            out = network.head_outputs(layer, q, k, v, positions=places)[:, :, :, 0]
            given = outputs[layer][:, None].to(out.dtype)
            out = torch.where(batch[:, layer].T[:, :, None, None], given, out)
            x = _after(network, layer, x, out.sum(0) + network.constant(layer))
        for part in x.split(step):
            yield network.logits(part).float()


def head_masks(graph: Graph, sets: Sequence[Sequence[str]]) -> Bool[Tensor, "s L H"]:
    """Which heads of the model are in each set of names."""
    masks = torch.zeros(len(sets), graph.n_layers, graph.n_heads, dtype=torch.bool)
    for mask, heads in zip(masks, sets, strict=True):
        for place in map(graph.node, heads):
            mask[place.layer, place.head] = True
    return masks


def _with_end(clean: Float[Tensor, "H N T K"], new: Float[Tensor, "H c N 1 K"], prompts: Prompts) -> Tensor:
    """Keys or values of each candidate: the clean ones, its own at END."""
    every = clean[:, None].repeat(1, new.shape[1], 1, 1, 1)
    every[:, :, torch.arange(len(prompts), device=clean.device), prompts.ends] = new[..., 0, :]
    return every


def _after(network: Network, layer: int, before: Tensor, attention: Tensor) -> Tensor:
    """The residual stream after a block."""
    middle = before + attention
    return middle + network.mlp(layer, before if network.graph.parallel else middle)


@torch.no_grad()
def patched_answers(model: Model, prompts: Prompts, heads: Sequence[tuple[int, int]]) -> list[float]:
    """The change of the answer's log-probability when a head's direct path brings what it brings on the paired prompt.

    Path patching from each (layer, head) to the logits (arXiv 2211.00593): nothing else hears of it. Mean over prompts,
    all of which have a partner.
    """
    network = model.network
    clean = attribute(model, prompts)
    other = attribute(model, replace(prompts, tokens=prompts.corrupted))
    change = head_outputs(network, other) - head_outputs(network, clean)
    residual = at_end(forward(network, prompts.tokens).residual, prompts)
    answers = prompts.answers[:, :1]

    def log_probability(x: Float[Tensor, "*c N D"]) -> Float[Tensor, "*c N"]:
        logp = network.logits(x.to(network.dtype)).float().log_softmax(-1)
        return logp.gather(-1, answers.expand(*logp.shape[:-1], 1))[..., 0]

    before, found = log_probability(residual), []
    step = max(1, _LOGIT_BYTES // (len(prompts) * network.d_vocab * 4))
    for start in range(0, len(heads), step):
        some = torch.stack([change[layer, head] for layer, head in heads[start : start + step]])
        found += (log_probability(residual + some) - before).mean(-1).tolist()
    return found
