"""What an encoder's answer loses without one of its heads or MLPs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import PositionClasses
from kcwb.errors import DataError, choose
from kcwb.models.encoder import Encoder, record_nodes, run_encoder
from kcwb.models.graph import Graph, Node
from kcwb.progress import Progress, track
from kcwb.settings import Count
from kcwb.tasks.masked import MaskedPrompts, MaskedTask, at_masks
from kcwb.tasks.metrics import together
from kcwb.tasks.ranks import rank_of_best
from kcwb.tasks.task import check_same_weights
from kcwb.verbs import verb


@verb
def ablate_encoder(
    encoder: Encoder, task: MaskedTask, *, ablation: str = "mean", k: Count = 10, progress: Progress = True
) -> pd.DataFrame:
    """The effect of ablating each head and each MLP of an encoder, one at a time, at every position.

    Parameters
    ----------
    encoder, task
        The model, and a task made for it.
    ablation
        What the node computes instead: `zero`; `mean`, its mean over the task's reference prompts at the same position
        counted from the mask, position 0 apart (`kcwb.circuits.ablation.PositionClasses`); or `resample`, what it
        computes on the paired prompt.
    k
        An answer counts as a hit when it is among the k most likely.
    progress
        Reported per node.

    Returns
    -------
    DataFrame
        One row per node and split (`D_val`, `D_test`): `node`, `kind`, `layer`, `head`, `split`, `n` facts, mean `nll`
        of the answer (nats), `change` against the full model (positive: the node helps), `hit`, `flipped` (hits of the
        full model that are lost). The first row of a split, `node` "none", is the full model.

    Raises
    ------
    SettingError
        If the ablation is not known, `k` is below 1, or the task was made for other weights.
    DataError
        Under `resample`, if no prompt of D_val has a partner.
    """
    choose("The ablation", ablation, ("zero", "mean", "resample"))
    check_same_weights(encoder, task, "make_masked_task")
    splits = {"D_val": _usable(task.val, ablation), "D_test": _usable(task.test, ablation)}
    if not len(splits["D_val"]):
        raise DataError("No fact of D_val has a partner whose prompt is as long, for resample. Use zero or mean.")
    splits = {split: prompts for split, prompts in splits.items() if len(prompts)}
    means = _mean_nodes(encoder, task.reference) if ablation == "mean" else None
    rows, graph = [], Graph(encoder.n_layers, encoder.n_heads)
    with track(progress, len(splits) * (1 + len(encoder.nodes)), "ablation") as step:
        for split, prompts in splits.items():
            values = _ablated(encoder, prompts, ablation, means)
            full, known = _measure(encoder, prompts, {}, k)
            for node in ("none", *encoder.nodes):
                loss, hit = (full, known) if node == "none" else _measure(encoder, prompts, {node: values[node]}, k)
                numbers = {"n": len(prompts), "nll": float(loss.mean()), "change": float((loss - full).mean())}
                numbers |= {"hit": float(hit.float().mean()), "flipped": int((known & ~hit).sum())}
                place = Node("none", -1, -1) if node == "none" else graph.node(node)
                rows.append({"node": node, **place._asdict(), "split": split, **numbers})
                step(1, node)
    return pd.DataFrame(rows)


def _usable(prompts: MaskedPrompts, ablation: str) -> MaskedPrompts:
    return prompts.select(prompts.paired.nonzero()[:, 0].tolist()) if ablation == "resample" else prompts


def _measure(
    encoder: Encoder, prompts: MaskedPrompts, replaced: Mapping[str, Tensor | float], k: int
) -> tuple[Float[Tensor, " N"], Tensor]:
    """The answer's loss and whether it is a hit, for each prompt."""
    logits = at_masks(run_encoder(encoder, prompts.tokens, prompts.real, replaced), prompts.masks).float()
    return logits.logsumexp(-1) - together(logits, prompts.right), rank_of_best(logits, prompts.right) <= k


def _ablated(
    encoder: Encoder, prompts: MaskedPrompts, ablation: str, means: tuple[dict[str, Tensor], PositionClasses] | None
) -> Mapping[str, Tensor | float]:
    """What each node computes when it is ablated."""
    if ablation == "resample":
        return record_nodes(encoder, prompts.corrupted, prompts.real)
    if means is None:
        return dict.fromkeys(encoder.nodes, 0.0)
    table, classes = means
    place = classes.of(prompts.masks, prompts.tokens.shape[1])
    return {node: mean[place] for node, mean in table.items()}


def _mean_nodes(encoder: Encoder, prompts: MaskedPrompts) -> tuple[dict[str, Float[Tensor, "K X"]], PositionClasses]:
    """Each node's mean in each class of positions, and the classes."""
    classes = PositionClasses.over(prompts.masks, prompts.real)
    weights = classes.weights(prompts.masks, prompts.real).flatten(0, 1).T
    values = record_nodes(encoder, prompts.tokens, prompts.real)
    return {node: (weights @ value.flatten(0, 1).float()).to(value.dtype) for node, value in values.items()}, classes
