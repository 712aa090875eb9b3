"""The logit lens: what the residual stream says after each layer, and at which layer a fact arrives.

After each block the residual stream is read as if the model ended there (`kcwb.reading.trajectories`; as Figure 3 of
Knowledge Circuits, arXiv 2405.17969):

- `object`: the answer's first token, at END;
- `subject`: the first token of the subject, as it would follow the prompt, at END;
- `object, subject's tokens`: the object at that one of the subject's tokens where it stands best.

Layer l means after block l; layer -1 is the embedding alone. The last layer is the model's own answer.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import torch

from kcwb.errors import DataError, nearest
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.progress import Progress, track
from kcwb.reading.positions import check_subjects, split_of, told_at_end, without_copies
from kcwb.reading.trajectories import follow, layer_streams
from kcwb.settings import Seed
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.prompts import KNOWN_RANK, Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.tasks.tokens import answer_tokens
from kcwb.verbs import verb

#: What is looked for -> where (the index in `kcwb.reading.trajectories.WHERE`), and the object (0) or the subject (1).
_LOOKED_FOR = {"object": (0, 0), "subject": (0, 1), "object, subject's tokens": (2, 0)}
WHO = tuple(_LOOKED_FOR)


@verb
def lens(
    model: Model,
    task: Task,
    *,
    fact: str | None = None,
    split: str = "val",
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Rank and probability of object and subject after each layer, over a task's facts or for one of them.

    Parameters
    ----------
    model, task
        The full model is run. A fact whose object begins with a token of its subject, or with that of another object of
        the relation, is left out with a warning.
    fact
        The subject of one fact of D_val or D_test; None for all facts of a split.
    split
        `val` or `test`; not read when a fact is named.

    Returns
    -------
    DataFrame
        One row per layer, quantity and `who` (see the top of this module): `layer`, `quantity`, `who`, `value`, `low`,
        `high`, `facts`. `low` and `high` are the 95% bootstrap interval of the mean over facts, and for `hit_10`
        Wilson's of the share of facts; NaN for a single fact. The quantities:

        - `rank`: the geometric mean of the ranks, from 1 (ranks run from 1 to the size of the vocabulary, and one fact
          at rank 30,000 would outweigh all others in a plain mean);
        - `probability`: the mean probability;
        - `hit_10`: the share of facts with a rank of at most 10.

    Raises
    ------
    DataError
        If the named fact is not in the task, or no fact is left.
    """
    table = lens_by_fact(model, task, fact=fact, split=split, progress=progress)
    table["hit_10"] = (table["rank"] <= KNOWN_RANK).astype(float)
    rows = []
    for (layer, who), some in table.groupby(["layer", "who"], sort=False):
        ends = {"rank": geometric_mean(some["rank"], seed)}
        ends["probability"] = [some["probability"].mean(), *mean_interval(some["probability"], seed)]
        hits = proportion_interval(some["hit_10"]) if len(some) > 1 else (math.nan, math.nan)
        ends["hit_10"] = [some["hit_10"].mean(), *hits]
        rows += [(layer, quantity, who, *values, len(some)) for quantity, values in ends.items()]
    found = pd.DataFrame(rows, columns=["layer", "quantity", "who", "value", "low", "high", "facts"])
    return found.sort_values(["quantity", "who", "layer"], kind="stable").reset_index(drop=True)


def geometric_mean(ranks: pd.Series, seed: int) -> list[float]:
    """Of ranks, and the ends of its 95% bootstrap interval."""
    logs = np.log(ranks.to_numpy(dtype=float))
    return [math.exp(x) for x in (logs.mean(), *mean_interval(logs, seed))]


def lens_by_fact(
    model: Model, task: Task, *, fact: str | None = None, split: str = "val", progress: Progress = True
) -> pd.DataFrame:
    """The same fact by fact: `subject`, `object`, `layer`, `who`, `rank` (from 1), `probability`."""
    check_same_weights(model, task)
    prompts = split_of(task, split) if fact is None else _one_fact(task, fact)
    if not len(prompts):
        raise DataError(f"The split {split!r} of {task.relation.name} has no facts; make the task with more.")
    check_subjects(prompts)
    prompts = without_copies(model, told_at_end(prompts))

    def work(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = prompts.select(rows)
        subjects = [answer_tokens(model, task.template, fact.subject, fact.named, fact.space) for fact in part.facts]
        tokens = torch.stack([part.answers[:, 0], torch.tensor([one[0] for one in subjects], device=model.device)], -1)
        at = torch.arange(part.tokens.shape[1], device=model.device)
        subject = (at >= part.subject_start[:, None]) & (at < part.subject_stop[:, None])
        streams = layer_streams(model.network, part.tokens)
        return follow(model.network, streams, part, tokens, subject, lambda: step(len(part)))

    with track(progress, len(prompts) * (model.graph.n_layers + 1), "lens") as step:
        parts = zip(*by_prompts(model.network, prompts.tokens, work), strict=True)
        ranks, probabilities = (torch.cat(values, 2) for values in parts)
    facts, tables = pd.DataFrame(prompts.facts, columns=["subject", "object"]), []
    for layer, (who, (where, token)) in itertools.product(range(ranks.shape[1]), _LOOKED_FOR.items()):
        found = {"rank": ranks[where, layer, :, token], "probability": probabilities[where, layer, :, token]}
        values = {name: value.tolist() for name, value in found.items()}
        tables.append(facts.assign(layer=layer - 1, who=who, **values))
    return pd.concat(tables, ignore_index=True)


@verb
def arrival(
    model: Model, task: Task, *, fact: str | None = None, split: str = "val", progress: Progress = True
) -> pd.DataFrame:
    """At which layer each fact arrives: where its object is first among the ten likeliest tokens.

    Returns
    -------
    DataFrame
        One row per fact: `subject`, `object`; `at_subject`, the first layer where the object has rank 10 or better at
        one of the subject's tokens; `at_end`, the same at END; `stays`, the layer from which on it keeps that at END
        until the model's answer; `rank`, that of the answer. Missing (NA) where it never does.
    """
    table = lens_by_fact(model, task, fact=fact, split=split, progress=progress)
    rows = []
    table = table.drop_duplicates(["subject", "object", "layer", "who"])  # facts may stand in a task more than once
    for (subject, obj), some in table.groupby(["subject", "object"], sort=False):
        ranks = some.pivot(index="layer", columns="who", values="rank")
        at_end, at_subject = ranks[WHO[0]] <= KNOWN_RANK, ranks[WHO[2]] <= KNOWN_RANK
        kept = at_end[::-1].cummin()[::-1]
        firsts = [hits.index[hits.to_numpy()].min() if hits.any() else pd.NA for hits in (at_subject, at_end, kept)]
        rows.append((subject, obj, *firsts, ranks[WHO[0]].iloc[-1]))
    found = pd.DataFrame(rows, columns=["subject", "object", "at_subject", "at_end", "stays", "rank"])
    return found.astype(dict.fromkeys(["at_subject", "at_end", "stays", "rank"], "Int64"))


def _one_fact(task: Task, subject: str) -> Prompts:
    for prompts in (task.val, task.test):
        for row, fact in enumerate(prompts.facts):
            if fact.subject == subject:
                return prompts.select([row])
    known = [fact.subject for prompts in (task.val, task.test) for fact in prompts.facts]
    raise DataError(f"The task of {task.relation.name} has no fact about {subject!r:.60}. {nearest(subject, known)}")
