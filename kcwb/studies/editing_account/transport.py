"""Which way an edit takes: some outputs of the unedited run are put back into the edited model, at END or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.editing.edit import Edit
from kcwb.errors import DataError
from kcwb.interventions.at_end import head_masks, logits_with
from kcwb.interventions.block import Block, run_block, run_blocks
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.statistics import chance_range, matched_head_sets, p_value
from kcwb.tasks.prompts import Prompts


@torch.no_grad()
def trace_blocks(network: Network, tokens: Int[Tensor, "1 T"]) -> list[Block]:
    """All blocks of the full model on one prompt up to END."""
    return [*run_blocks(network, tokens)]


@torch.no_grad()
def transport(
    model: Model, made: Edit, prompt: Prompts, clean: list[Block], edited: list[Block],
    written: Mapping[int, Float[Tensor, "1 T D"]], tokens: Int[Tensor, "2"], movers: Sequence[str], draws: int,
    seed: int,
) -> tuple[pd.DataFrame, float]:  # fmt: skip
    """TE of everything that is put back, and p; runs inside the edit, which is this model's own.

    `written` is what the edit's MLPs wrote before it, `mlp_outputs` of the clean trace.

    Raises
    ------
    DataError
        If the edit leaves the difference of the objects' logits as it was, so that there is no effect to share out.
    """
    made.require_own(model)
    network, graph = model.network, model.graph
    ids = prompt.tokens[:, : int(prompt.ends[0]) + 1]

    def difference(logits: Float[Tensor, "B V"]) -> Float[Tensor, " B"]:
        old, new = logits[:, tokens].float().unbind(-1)
        return new - old

    before, after = (float(difference(network.logits(trace[-1].after[:, -1]))) for trace in (clean, edited))
    moved = after - before
    if not moved:
        raise DataError(
            f"{made} changes nothing between the two objects at END: there is no effect to take a share of."
        )

    def effect(logits: Float[Tensor, "B V"]) -> Float[np.ndarray, " B"]:
        return (after - difference(logits)).cpu().numpy() / moved

    sets = head_masks(graph, [movers, *matched_head_sets(graph, movers, draws, seed)]).to(model.device)
    outputs = head_outputs_at_end(network, ids, clean)[:, :, None]
    through = effect(torch.cat(list(logits_with(model, prompt, outputs, sets)))[:, 0])
    chance, low, high = chance_range(through[1:])
    rows: list[dict[str, Any]] = [
        {"what": "mover heads", "TE": float(through[0])},
        {"what": "random heads", "TE": chance, "low": low, "high": high},
    ]
    positions = torch.arange(ids.shape[1], device=model.device)
    subject = (positions >= prompt.subject_start[0]) & (positions < prompt.subject_stop[0])
    end = positions == ids.shape[1] - 1
    for what, where in (("subject", subject & ~end), ("END", end), ("elsewhere", ~subject & ~end)):
        final = outputs_put_back(network, ids, written, where)
        rows.append({"what": f"edited MLP, {what}", "TE": float(effect(network.logits(final[:, -1]))[0])})
    return pd.DataFrame(rows, columns=["what", "TE", "low", "high"]), p_value(float(through[0]), through[1:])


@torch.no_grad()
def mlp_outputs(network: Network, trace: Sequence[Block], layers: Sequence[int]) -> dict[int, Float[Tensor, "1 T D"]]:
    """What the MLPs of some layers wrote in a traced run; to be asked for before their weights change."""
    return {layer: network.mlp_output(layer, trace[layer].hidden) for layer in layers}


def head_outputs_at_end(network: Network, tokens: Int[Tensor, "1 T"], trace: Sequence[Block]) -> Float[Tensor, "L H D"]:
    """Every head's output at END, through W_O, from the traced run."""
    end = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    x, found = network.embed(tokens), []
    for layer, block in enumerate(trace):
        q = network.queries(layer, x[None, :, -1:], positions=end)
        found.append(network.head_outputs(layer, q, block.keys, block.values, positions=end)[:, 0, 0])
        x = block.after
    return torch.stack(found)


@torch.no_grad()
def outputs_put_back(
    network: Network, tokens: Int[Tensor, "1 T"], outputs: Mapping[int, Float[Tensor, "1 T D"]],
    where: Bool[Tensor, " T"],
) -> Float[Tensor, "1 T D"]:  # fmt: skip
    """The final stream when some layers' MLPs write `outputs` at the positions `where`."""
    x = network.embed(tokens)
    for layer in range(network.graph.n_layers):
        block = run_block(network, layer, x)
        x = block.after
        if layer in outputs:
            x = x + where[None, :, None] * (outputs[layer] - network.mlp_output(layer, block.hidden))
    return x
