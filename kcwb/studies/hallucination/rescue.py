"""Do mover heads cause wrong answers: what they write where the model is right, put in where it is wrong.

Some facts a model gets right in one template and wrong in another. Their two prompts say the same and differ in words,
so that what the mover heads write at END in the right one can be put in their place at END in the wrong one; all that
follows END's layers is computed anew (activation patching; the case that Knowledge Circuits, arXiv 2405.17969, tells is
of a mover head that brings the wrong information). If wrong answers are the movers' doing, the right answer should
come back:

- `rescued`: the right answer is the likeliest token now;
- `rise`: by how much its logit has risen over that of the wrong answer (logits).

Beside them stand random sets of as many other heads of the same layers (`kcwb.statistics.matched_head_sets`), with p
the share of draws, the movers counted in, that do as well; and all heads at once, the most that heads at END can do.
The movers of a relation are found on facts that are in no pair. Each fact is in one pair, and facts are what intervals
are over: they speak of further facts of these relations, not of other relations.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.errors import DataError, SettingError
from kcwb.evaluation.knowledge import sample_facts
from kcwb.interventions.at_end import at_end, head_masks, logits_with
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.dla import attribute, head_outputs, named_heads
from kcwb.reading.positions import check_prompts, rows_told_at_end, says_its_object, token_text
from kcwb.reading.roles import strongest_movers
from kcwb.reading.trajectories import right_and_rival
from kcwb.settings import Count, Seed, at_least
from kcwb.statistics import matched_head_sets, mean_interval, p_value, proportion_interval
from kcwb.studies.hallucination.measurement import FEWEST_FACTS, task_of
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.ranks import rank_of_best
from kcwb.tasks.relations import Relation, load_relation, require_subjects
from kcwb.verbs import verb

_ROLE_FACTS = 16
#: What is put in, in the order of the table.
RUNS = ("movers", "random heads", "all heads")


@dataclass(frozen=True, eq=False)
class Rescue:
    """What becomes of wrong answers; made by `rescue`.

    Attributes
    ----------
    summary
        One row for each of `RUNS`, and `movers - random heads`: `facts`; `rescued`, a share of them, and `rise`, each
        with `..._low` and `..._high`; `p_rescued`, `p_rise` of the movers. Of random heads, means over draws. The
        intervals are 95%: Wilson's of the share of facts that movers, or all heads, rescue; the bootstrap's of the mean
        over facts for all else (the difference is paired, fact by fact). NaN where there are too few other heads.
    pairs
        One row per fact: `relation`, `subject`, `object`, `right_in`, `wrong_in` (templates), `predicted` in the wrong
        one; `gap`, the logit of the right answer there minus the wrong one's; and `rescued` and `rise` of each run.
    relations
        One row per relation: `facts`, of which `always_right`, `always_wrong` and `mixed` over the templates; `pairs`,
        those used; `movers`; the share of them `rescued` by movers, random heads and all heads.
    """

    summary: pd.DataFrame
    pairs: pd.DataFrame
    relations: pd.DataFrame


@verb
def rescue(
    model: Model,
    relations: Sequence[Relation | str],
    *,
    templates: Sequence[int] = (0, 1),
    n: Annotated[int, at_least(FEWEST_FACTS)] = 40,
    pairs: Count = 10,
    movers: Count | Sequence[str] = 10,
    draws: Annotated[int, at_least(20)] = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> Rescue:
    """Patch mover heads' outputs at END from a template in which the model is right into one in which it is wrong.

    Parameters
    ----------
    model
        The full model is run.
    relations
        One or more. Those without a fact that is right here and wrong there are passed over, and counted. Facts whose
        object begins with a token of the subject, or with the same token as another object, are left out.
    templates
        The indices of two or more zero-shot templates.
    n
        Facts of each relation that are asked, drawn with `seed`.
    pairs
        The most facts of each relation that are patched, drawn with `seed`.
    movers
        How many mover heads of each relation are put in, those with the largest D_S on facts in no pair; or the names
        of heads, for all relations.
    draws
        Random sets of heads; where no relation has so many, as many as there are.

    Raises
    ------
    DataError
        If no fact of any relation is right in one template and wrong in another, or too few others are known to find
        movers on; says how many there are.
    CircuitError
        If a named head is not one.
    """
    model.network.require("roles")
    found = [load_relation(one) if isinstance(one, str) else one for one in relations]
    for relation in found:
        require_subjects(relation, "A rescue of wrong answers")
    texts = _check(model, found, templates, movers)
    rows, counts = [], []
    with track(
        progress, sum(min(n, len(one.facts)) for one in found) * len(templates) + pairs * len(found), "rescue"
    ) as step:
        for i, (relation, some) in enumerate(zip(found, texts, strict=True)):
            asked = _ask(model, relation, some, n, seed, step)
            count, used, names = _choose(model, asked, pairs, movers, seed)
            counts.append({"relation": relation.name, **count, "pairs": len(used), "movers": ", ".join(names)})
            if used:
                rows.append(_patch_relation(model, asked, used, names, draws, seed + i))
            step(pairs, relation.name)
    counted = pd.DataFrame(counts)
    if not rows:
        raise DataError(_nothing(counted))
    table = pd.concat([one.table for one in rows], ignore_index=True)
    chance = {name: _side_by_side([one.chance[i] for one in rows]) for i, name in enumerate(("rescued", "rise"))}
    shares = table.groupby("relation")[[f"rescued, {run}" for run in RUNS]].mean()
    return Rescue(_summary(table, chance, seed), table, counted.merge(shares, on="relation", how="left"))


# --- which facts ---


class _Asked(NamedTuple):
    """One relation in several templates, the same facts in each."""

    relation: Relation
    texts: list[str]
    prompts: list[Prompts]


def _ask(model: Model, relation: Relation, texts: list[str], n: int, seed: int, step: Callable[..., None]) -> _Asked:
    facts, prompts = sample_facts(relation, n, seed), []
    for text in texts:
        some = encode(model, facts, text, relation.objects, seed)
        check_prompts(some)
        prompts.append(some)
        step(len(facts), relation.name)
    told = rows_told_at_end(*prompts)
    good = [i for i in told if not any(says_its_object(model, some, i) for some in prompts)]
    return _Asked(relation, texts, [some.select(good) for some in prompts])


class _Pair(NamedTuple):
    """A row of all prompts, and the numbers of two templates."""

    row: int
    right: int
    wrong: int


def _choose(
    model: Model, asked: _Asked, most: int, movers: int | Sequence[str], seed: int
) -> tuple[dict[str, int], list[_Pair], list[str]]:
    """Counts, the pairs that are used, and the movers; no pairs where there are none, or no movers to be found."""
    right = torch.stack([prompts.ranks == 1 for prompts in asked.prompts]).cpu().numpy()
    mixed = np.flatnonzero(right.any(0) & ~right.all(0))
    counts = {
        "facts": right.shape[1],
        "always_right": int(right.all(0).sum()),
        "always_wrong": int((~right.any(0)).sum()),
        "mixed": len(mixed),
    }
    used = sorted(random.Random(seed).sample(mixed.tolist(), min(most, len(mixed))))
    pairs = [_Pair(row, int(right[:, row].argmax()), int(right[:, row].argmin())) for row in used]
    if not isinstance(movers, int):
        return counts, pairs, list(movers)
    rest = [row for row in asked.prompts[0].known.nonzero()[:, 0].tolist() if row not in set(used)][:_ROLE_FACTS]
    if not pairs or len(rest) < FEWEST_FACTS:
        return counts, [], []
    task = task_of(model, asked.relation, asked.texts[0], asked.prompts[0], rest, seed)
    try:
        return counts, pairs, strongest_movers(model, task, movers, seed)
    except DataError:  # no head is a mover
        return counts, [], []


def _nothing(counts: pd.DataFrame) -> str:
    said = "; ".join(
        f"{row.relation}: {row.facts} facts, {row.always_right} right and {row.always_wrong} wrong in all templates, "
        f"{row.mixed} mixed"
        for row in counts.itertuples()
    )
    if not counts["mixed"].any():
        return f"No fact is right in one template and wrong in another, so nothing can be patched ({said})."
    return (
        f"There are no mover heads to patch: they are found on {FEWEST_FACTS} known facts or more that are in no pair "
        f"({said}). Raise n, lower pairs, or name them: movers=[...]."
    )


# --- patching ---


class _Patched(NamedTuple):
    """One relation's pairs, and what each random set does to each of them: whether it is rescued, and the rise."""

    table: pd.DataFrame
    chance: Float[np.ndarray, "2 draws n"]


@torch.no_grad()
def _patch_relation(
    model: Model, asked: _Asked, pairs: Sequence[_Pair], movers: Sequence[str], draws: int, seed: int
) -> _Patched:
    """Put what heads write in the right prompts into the wrong ones, template by template."""
    graph, network = model.graph, model.network
    names = [head.node for head in named_heads(model, movers)]
    sets = head_masks(graph, [names, *matched_head_sets(graph, names, draws, seed)])
    every = torch.ones_like(sets[:1])
    parts = []
    for (right, wrong), some in itertools.groupby(sorted(pairs, key=lambda one: one[1:]), key=lambda one: one[1:]):
        rows = [one.row for one in some]
        source, target = asked.prompts[right].select(rows), asked.prompts[wrong].select(rows)
        outputs = head_outputs(network, attribute(model, source))
        before = network.logits(at_end(forward(network, target.tokens).residual, target)).float()
        gold, rival = right_and_rival(before, target).unbind(-1)  # which may tie
        gap = _gap(before, gold, rival)
        after = []  # of movers and random sets, and of all heads: whether it rescues each prompt, and the rise
        for which in (sets, every):
            found = []
            for logits in logits_with(model, target, outputs, which):
                first = rank_of_best(logits, target.right[:, 0].expand(len(logits), -1, -1)) == 1
                found.append(torch.stack([first.double(), (_gap(logits, gold, rival) - gap).double()]))
            after.append(torch.cat(found, 1).cpu().numpy())
        table = pd.DataFrame(
            {
                "relation": asked.relation.name,
                "subject": [fact.subject for fact in target.facts],
                "object": [fact.object for fact in target.facts],
                "right_in": asked.texts[right],
                "wrong_in": asked.texts[wrong],
                "predicted": [token_text(model, token) for token in rival.tolist()],
                "gap": gap.tolist(),
            }
        )
        own, all_heads = after
        chance = own[:, 1:]
        random = chance.mean(1) if chance.size else np.full_like(own[:, 0], np.nan)
        for i, name in enumerate(("rescued", "rise")):
            for run, values in zip(RUNS, (own[i, 0], random[i], all_heads[i, 0]), strict=True):
                table[f"{name}, {run}"] = values
        parts.append(_Patched(table, chance))
    tables, chances = zip(*parts, strict=True)
    return _Patched(pd.concat(tables, ignore_index=True), np.concatenate(chances, 2))


def _gap(logits: Float[Tensor, "*c N V"], gold: Int[Tensor, " N"], rival: Int[Tensor, " N"]) -> Float[Tensor, "*c N"]:
    """The right answer's logit minus the wrong one's."""
    pair = torch.stack([gold, rival], -1).expand(*logits.shape[:-1], 2)
    own, other = logits.gather(-1, pair).unbind(-1)
    return own - other


# --- tables ---


def _side_by_side(chance: Sequence[Float[np.ndarray, "draws n"]]) -> Float[np.ndarray, "draws N"]:
    """The draws of several relations as draws of all; where one has fewer, they come round again (NaN for none)."""
    most = max(map(len, chance))
    rows = [one if len(one) else np.full((1, one.shape[1]), np.nan) for one in chance]
    return np.concatenate([one.take(range(most), axis=0, mode="wrap") for one in rows], 1)


def _summary(table: pd.DataFrame, chance: Mapping[str, Float[np.ndarray, "draws n"]], seed: int) -> pd.DataFrame:
    """Means with intervals over facts, and the movers' p."""
    rows = []
    for run in (*RUNS, f"{RUNS[0]} - {RUNS[1]}"):
        row: dict[str, object] = {"heads": run, "facts": len(table)}
        for name, drawn in chance.items():
            own, other = (table[f"{name}, {one}"].to_numpy(dtype=float) for one in RUNS[:2])
            values = own - other if run not in RUNS else table[f"{name}, {run}"].to_numpy(dtype=float)
            row[name] = values.mean()
            hits = name == "rescued" and run in ("movers", "all heads")
            ends = proportion_interval(values) if hits else mean_interval(values, seed)
            row[f"{name}_low"], row[f"{name}_high"] = ends
            if run == RUNS[0]:
                row[f"p_{name}"] = p_value(own.mean(), drawn.mean(1))
        rows.append(row)
    spread = [f"{name}{end}" for name in chance for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["heads", "facts", *spread, *(f"p_{name}" for name in chance)])


def _check(
    model: Model, relations: Sequence[Relation], templates: Sequence[int], movers: int | Sequence[str]
) -> list[list[str]]:
    """Refuse what cannot be meant; the relations' templates."""
    if not relations:
        raise DataError("There is no relation to look at.")
    names = [relation.name for relation in relations]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"The relation {twice[0]!r:.60} is given twice: a fact must be in one pair.")
    if len(set(templates)) < 2:
        raise SettingError(f"templates={list(templates)}: two different ones are needed, one right and one wrong.")
    if not isinstance(movers, int) and not named_heads(model, movers):
        raise SettingError("movers=[]: name a head, or give a number.")
    return [[relation.template(which) for which in templates] for relation in relations]
