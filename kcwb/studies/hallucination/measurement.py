"""What a model and its heads do on many prompts, which it answers right or wrong: the ground of `hallucination_study`.

One prompt per fact, over several relations; an answer is wrong if the likeliest token is the first of no right one.
Recorded are numbers per prompt, and for every head of the model its attention and what it writes, so that features can
be made of any heads without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from kcwb.errors import DataError
from kcwb.evaluation.knowledge import sample_facts
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.dla import attribute
from kcwb.reading.positions import check_prompts, position_groups, says_its_object, token_text, told_at_end
from kcwb.reading.roles import head_roles
from kcwb.reading.trajectories import read_trajectories
from kcwb.settings import Seed, at_least
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Relation, load_relation, require_subjects
from kcwb.tasks.task import Task
from kcwb.tasks.tokens import objects_after
from kcwb.verbs import verb

#: Kinds of answers: another object of the relation is a hallucination proper, another word often a generic one.
KINDS = ("right", "another object", "another word")
FEWEST_FACTS = 4
_FEWEST_RELATIONS = 3
_ROLE_FACTS, _SHUFFLES = 16, 100


@dataclass(frozen=True, eq=False)
class Measured:
    """What the model does on each of many prompts; made by `measure_answers`.

    Attributes
    ----------
    graph
        The model's.
    prompts
        One row per prompt: `relation`, `prompt`, `subject`, `object`, `predicted` (a token), `rank` of the right
        answer, `wrong`; `kind`, one of `KINDS`, by what was predicted: the right answer, another object of the
        relation, or neither (a generic continuation, often); `max_probability`, `entropy` (nats); `arrival` (a layer;
        the number of layers where it never arrives), `subject_rank` (log10 of the best), `recalled` (whether that is
        10 or better).
    attention, gold, rival
        `[N, L*H]` for every head: END's attention to the subject, and what it writes towards the right answer and
        towards the likeliest wrong token (logits).
    movers
        `[relations, L*H]`, the rows as in `relations`: D_S of the heads that are movers on the relation's facts, 0 for
        the others.
    relations
        One row per relation: `relation`, `template`, `facts`; `left_out`, facts whose object begins with a token of the
        subject, so that copying would pass for knowing, or with the same token as another object; `wrong`; `movers`,
        how many; `digest`, the start of the relation's SHA-256.
    """

    graph: Graph
    prompts: pd.DataFrame
    attention: Float[np.ndarray, "N LH"]
    gold: Float[np.ndarray, "N LH"]
    rival: Float[np.ndarray, "N LH"]
    movers: Float[np.ndarray, "r LH"]
    relations: pd.DataFrame

    def select(self, rows: Sequence[bool] | pd.Series) -> Measured:
        """Some of the prompts (a truth value for each); movers stay what they are."""
        keep = np.asarray(rows, dtype=bool)
        prompts = self.prompts[keep].reset_index(drop=True)
        counts = prompts.groupby("relation")["wrong"].agg(["size", "sum"]).reindex(self.relations["relation"]).fillna(0)
        relations = self.relations.assign(facts=counts["size"].to_numpy(int), wrong=counts["sum"].to_numpy(int))
        arrays = (self.attention[keep], self.gold[keep], self.rival[keep])
        return Measured(self.graph, prompts, *arrays, self.movers, relations)


@verb
def measure_answers(
    model: Model,
    relations: Sequence[Relation | str],
    *,
    n: Annotated[int, at_least(FEWEST_FACTS)] = 40,
    template: int = 0,
    seed: Seed = 0,
    progress: Progress = True,
) -> Measured:
    """Ask for the facts and record what every head does; parameters and errors as in `hallucination_study`."""
    model.network.require("roles")
    found = [load_relation(one) if isinstance(one, str) else one for one in relations]
    _check_relations(found)
    texts = [relation.template(template) for relation in found]
    samples = [sample_facts(relation, n, seed) for relation in found]
    parts, rows = [], []
    with track(progress, 3 * sum(map(len, samples)), "answers") as step:
        asked = []
        for relation, text, facts in zip(found, texts, samples, strict=True):
            prompts = encode(model, facts, text, relation.objects, seed)
            check_prompts(prompts)
            asked.append(_without_copies(model, told_at_end(prompts), relation))
            step(len(facts), relation.name)
        check_labels({one.name: (prompts.ranks != 1).cpu().numpy() for one, prompts in zip(found, asked, strict=True)})
        for relation, text, facts, prompts in zip(found, texts, samples, asked, strict=True):
            table, by_head = _measure(model, relation, text, prompts, step)
            movers = _mover_strengths(model, relation, text, prompts, seed)
            step(2 * len(facts) - len(prompts))
            parts.append((table, by_head, movers))
            rows.append(
                {
                    "relation": relation.name,
                    "template": text,
                    "facts": len(prompts),
                    "left_out": len(facts) - len(prompts),
                    "wrong": int(table["wrong"].sum()),
                    "movers": int((movers > 0).sum()),
                    "digest": relation.digest[:12],
                }
            )
    tables, by_head, movers = zip(*parts, strict=True)
    prompts = pd.concat(tables, ignore_index=True)
    return Measured(model.graph, prompts, *np.concatenate(by_head, 1), np.stack(movers), pd.DataFrame(rows))


def _measure(
    model: Model, relation: Relation, template: str, prompts: Prompts, step: Callable[..., None]
) -> tuple[pd.DataFrame, Float[np.ndarray, "3 N LH"]]:
    """Of one relation `Measured.prompts`, and `attention`, `gold` and `rival`."""
    readings = read_trajectories(model, prompts, step)
    found = attribute(model, prompts, readings.tokens)
    subject = position_groups(prompts)[0].to(found.attention.dtype)
    attention = torch.einsum("lhns,ns->nlh", found.attention, subject)
    by_head = torch.stack([attention, *found.total.permute(3, 2, 0, 1)]).flatten(2).cpu().numpy()
    right = readings.right
    predicted = torch.where(right, readings.tokens[:, 0], readings.tokens[:, 1]).tolist()
    after = objects_after(model, template, prompts.facts, relation.objects)
    objects = {space: {answer[0] for answer in some.values()} for space, some in after.items()}
    kinds = [
        KINDS[0] if good else KINDS[1] if token in objects[fact.space] else KINDS[2]
        for good, token, fact in zip(right.tolist(), predicted, prompts.facts, strict=True)
    ]
    table = pd.DataFrame(
        {
            "relation": relation.name,
            "prompt": prompts.texts,
            "subject": [fact.subject for fact in prompts.facts],
            "object": [fact.object for fact in prompts.facts],
            "predicted": [token_text(model, token) for token in predicted],
            "rank": readings.ranks[0, -1, :, 0].tolist(),
            "wrong": (~right).tolist(),
            "kind": kinds,
            "max_probability": readings.max_probability.tolist(),
            "entropy": readings.entropy.tolist(),
            "arrival": readings.arrival[0, :, 0].tolist(),
            "subject_rank": readings.ranks[2, :, :, 0].amin(0).double().log10().tolist(),
            "recalled": readings.recalled.tolist(),
        }
    )
    return table, by_head


def _mover_strengths(
    model: Model, relation: Relation, template: str, prompts: Prompts, seed: int
) -> Float[np.ndarray, " LH"]:
    """D_S of the heads that are movers on facts that the model knows, 0 elsewhere."""
    graph = model.graph
    strengths = np.zeros(graph.n_layers * graph.n_heads)
    known = prompts.known.nonzero()[:, 0].tolist()[:_ROLE_FACTS]
    if not known:
        return strengths
    task = task_of(model, relation, template, prompts, known, seed)
    roles = head_roles(model, None, task, shuffles=_SHUFFLES, resamples=1, seed=seed, progress=False)
    some = roles[roles["role"] == "mover"]
    strengths[some["layer"] * graph.n_heads + some["head"]] = some["D_S"]
    return strengths


def task_of(model: Model, relation: Relation, template: str, prompts: Prompts, rows: Sequence[int], seed: int) -> Task:
    """A task whose D_val is some prompts that are there already, and which has no D_test."""
    some, none, n = prompts.select(rows), prompts.select([]), len(rows)
    return Task(model.name, model.digest, relation, template, n, seed, some, none, some, n, len(prompts))


def _without_copies(model: Model, prompts: Prompts, relation: Relation) -> Prompts:
    rows = [row for row in range(len(prompts)) if not says_its_object(model, prompts, row)]
    if len(rows) < FEWEST_FACTS:
        raise DataError(
            f"Of {len(prompts)} facts of {relation.name}, {len(prompts) - len(rows)} have an object that begins with a "
            f"token of the subject, and {len(rows)} are left; at least {FEWEST_FACTS} are needed. Leave it out."
        )
    return prompts.select(rows)


# --- what is refused ---


def _check_relations(relations: Sequence[Relation]) -> None:
    names = [relation.name for relation in relations]
    if len(names) < _FEWEST_RELATIONS:
        raise DataError(
            f"{len(names)} relations are too few to leave one out and learn from the others: give at least "
            f"{_FEWEST_RELATIONS}."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"The relation {twice[0]!r:.60} is given twice: what is left out must not be learnt from.")
    for relation in relations:
        require_subjects(relation, "A prediction of wrong answers")
        if len(relation.facts) < FEWEST_FACTS:
            raise DataError(
                f"{relation.name} has {len(relation.facts)} facts; at least {FEWEST_FACTS} are needed. Leave it out."
            )


def check_labels(wrong: Mapping[str, Bool[np.ndarray, " n"]]) -> None:
    """Two relations need wrong and right answers: one to be tried on while the other is learnt from."""
    total, bad = sum(map(len, wrong.values())), sum(int(some.sum()) for some in wrong.values())
    counts = ", ".join(f"{name}: {int(some.sum())} of {len(some)}" for name, some in wrong.items())
    if not bad:
        raise DataError(f"All {total} answers are right, so there is nothing to predict. Ask for harder relations.")
    if bad == total:
        raise DataError(
            f"All {total} answers are wrong, so there is nothing to compare with. Ask for easier relations."
        )
    mixed = [name for name, some in wrong.items() if some.any() and not some.all()]
    if len(mixed) < 2:
        raise DataError(
            f"{len(mixed)} relations have both right and wrong answers; two are needed, so that each can be tried on "
            f"what the others teach. Wrong are: {counts}."
        )
