"""END without a head, or with another prompt's: what becomes of the logits there, for many heads at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.interventions.block import run_block
from kcwb.models.forward import forward
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.models.memory import in_pieces
from kcwb.reading.dla import attribute, head_outputs
from kcwb.tasks.metrics import at_end, together
from kcwb.tasks.prompts import Prompts

#: Rows (heads x prompts x positions) that a batch of ablated heads may take, and bytes of logits.
_ROWS, _LOGIT_BYTES = 2**15, 2**27


def logits_without(
    model: Model, prompts: Prompts, heads: Sequence[tuple[int, int]]
) -> Iterator[Float[Tensor, "c N V"]]:
    """Logits at END with the output of each (layer, head) in turn set to zero at END; see `logits_with`."""
    graph, network = model.graph, model.network
    nothing = torch.zeros(1, dtype=network.dtype, device=model.device)
    sets = torch.zeros(len(heads), graph.n_layers, graph.n_heads, dtype=torch.bool)
    sets[torch.arange(len(heads)), *torch.tensor(heads).T] = True
    outputs = nothing.expand(graph.n_layers, graph.n_heads, len(prompts), network.d_model)
    return logits_with(model, prompts, outputs, sets)


@torch.no_grad()
def logits_with(
    model: Model, prompts: Prompts, outputs: Float[Tensor, "L H N D"], sets: Bool[Tensor, "s L H"]
) -> Iterator[Float[Tensor, "c N V"]]:
    """Logits at END when each set's heads write `outputs` there instead of their own; sets come in batches, in order.

    Only END changes, and nothing after END is read. So keys and values of all other positions are those of one clean
    run, and each set's run begins at the first layer in which it has a head. Where a norm follows the attention, a
    head's output is its share of the normed sum.
    """
    network = model.network
    ends, rows = prompts.ends[:, None], torch.arange(len(prompts), device=model.device)
    streams = [x[:1] for x, _ in forward(network, prompts.tokens, receivers=True).receivers]
    kept = [(network.keys(i, x)[:, None], network.values(i, x)[:, None]) for i, x in enumerate(streams)]
    step = max(1, _LOGIT_BYTES // (len(prompts) * network.d_vocab * 4))
    sets = sets.to(model.device)

    def work(some: slice) -> Float[Tensor, "c N D"]:
        first, order = sets[some].any(-1).int().argmax(-1).sort(stable=True)
        batch, x = sets[some][order], streams[0].new_empty(0, len(prompts), 1, network.d_model)
        for layer, stream in enumerate(streams):
            running = int((first <= layer).sum())
            if running:
                x = torch.cat([x, stream[:, rows, prompts.ends, None].expand(running - len(x), -1, -1, -1)])
                head, one = batch[:running, layer].T.nonzero(as_tuple=True)

                def write(own: Tensor, head: Tensor = head, one: Tensor = one, layer: int = layer) -> Tensor:
                    own[head, one] = outputs[layer, head, :, None].to(own.dtype)
                    return own

                x = run_block(network, layer, x, ends, kept[layer], write).after
        return x[order.argsort(), :, 0]

    for found in in_pieces(len(sets), max(1, _ROWS // prompts.tokens.numel()), work):
        for part in found.split(step):
            yield network.logits(part).float()


def head_masks(graph: Graph, sets: Sequence[Sequence[str]]) -> Bool[Tensor, "s L H"]:
    """Which heads of the model are in each set of names."""
    masks = torch.zeros(len(sets), graph.n_layers, graph.n_heads, dtype=torch.bool)
    for mask, heads in zip(masks, sets, strict=True):
        for place in map(graph.node, heads):
            mask[place.layer, place.head] = True
    return masks


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

    def log_probability(x: Float[Tensor, "*c N D"]) -> Float[Tensor, "*c N"]:
        logp = network.logits(x.to(network.dtype)).float().log_softmax(-1)
        return together(logp, prompts.right[:, 0])

    before, found = log_probability(residual), []
    step = max(1, _LOGIT_BYTES // (len(prompts) * network.d_vocab * 4))
    for start in range(0, len(heads), step):
        some = torch.stack([change[layer, head] for layer, head in heads[start : start + step]])
        found += (log_probability(residual + some) - before).mean(-1).tolist()
    return found
