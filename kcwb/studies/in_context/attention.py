"""Which demonstrations heads read: END's attention to their objects, subjects and line breaks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from kcwb.models.loading import Model
from kcwb.reading.dla import attention_at_end, named_heads
from kcwb.reading.patterns import pattern_scores
from kcwb.reading.roles import circuit_heads
from kcwb.reading.trajectories import layer_streams
from kcwb.settings import Seed
from kcwb.statistics import chance_range, matched_head_sets, p_value
from kcwb.studies.in_context.ablation import asked_prompts
from kcwb.tasks.shots import GROUPS, ShotTask
from kcwb.tasks.task import check_same_weights
from kcwb.verbs import verb


@verb
@torch.no_grad()
def demonstration_attention(model: Model, task: ShotTask, *, split: str = "test", seed: Seed = 0) -> pd.DataFrame:
    """Where every head's END looks among the demonstrations, and how it behaves on repeated random tokens.

    Returns
    -------
    DataFrame
        One row per head of the model: `node`, `layer`, `head`; END's attention, mean over the facts of the split, to
        the demonstrations' `object`, `subject`, `separator` (line breaks) and other `words`, to the prompt's `first`
        token and to the `question`, which sum to 1; `object_share`, how much of its attention to the demonstrations
        (the first four) goes to objects (NaN for none); `induction` and `previous_token`, the scores of
        `kcwb.reading.roles.pattern_scores`.
    """
    check_same_weights(model, task)
    prompts, network = asked_prompts(task, split), model.network
    groups = task.groups(model, prompts).float()
    mass = [
        torch.einsum("hnt,gnt->hg", attention_at_end(network, layer, x, prompts).float(), groups) / len(prompts)
        for layer, x in enumerate(layer_streams(network, prompts.tokens)[:-1])
    ]
    table = pd.DataFrame(torch.cat(mass).cpu().numpy(), columns=list(GROUPS)).astype(float)
    places = pd.DataFrame(named_heads(model, circuit_heads(model, None)), columns=["node", "layer", "head"])
    read = table[["object", "subject", "separator", "words"]].sum(axis=1)
    table["object_share"] = table["object"] / read.where(read > 0)
    scores = pattern_scores(model, seed)
    for name in ("induction", "previous_token"):
        table[name] = scores[name].flatten().tolist()
    return pd.concat([places, table], axis=1)


_READING = ("object", "subject", "separator", "words", "first", "question", "induction", "previous_token")


def reading_summary(model: Model, heads: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What new heads read beside the circuit's other heads and random heads of the same layers.

    Parameters
    ----------
    heads
        A table of `demonstration_attention` with a column `status`: `new` for the new heads, `in neither` for heads of
        neither circuit.
    draws
        Random sets, as in `ablate_new`.

    Returns
    -------
    DataFrame
        One row per quantity of `demonstration_attention`: its mean over `new heads`, over the `other heads` of the
        circuits, over `random heads`, with `low` and `high`, 95% of the random sets, and `p`, the share of random sets
        (the new heads counted in) whose mean is at least as large. Empty where no head is new.
    """
    table = heads.set_index("node")
    new = table.index[table["status"] == "new"].tolist()
    columns = ["quantity", "new heads", "other heads", "random heads", "low", "high", "p"]
    if not new:
        return pd.DataFrame(columns=columns)
    sets = matched_head_sets(model.graph, new, draws, seed)
    drawn = table.index.get_indexer(pd.Index(np.ravel(sets))).reshape(len(sets), len(new))
    others = table[~table["status"].isin(["new", "in neither"])]
    rows = []
    for name in _READING:
        own, chance = table.loc[new, name].mean(), table[name].to_numpy()[drawn].mean(1)
        beside = others[name].mean() if len(others) else math.nan
        rows.append((name, own, beside, *chance_range(chance), p_value(own, chance)))
    return pd.DataFrame(rows, columns=columns)
