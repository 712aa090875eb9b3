"""A task that differs in one thing: asked in other words, with other corrupted partners, or with shuffled answers.

They are what an ensemble of circuits varies (`kcwb.discovery.draws`), and what it is compared with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.tasks.prompts import Prompts, draw_partners, encode, full_ranks
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import Task
from kcwb.tasks.tokens import padded


def in_other_words(model: Model, task: Task, template: str) -> Task:
    """The same facts in another template, with the same foils; which of them the model knows there, its prompts say.

    Raises
    ------
    DataError
        If the task's prompts are not its template's alone (they begin with demonstrations, say), or the facts do not go
        into this one.
    """
    if any(a != task.template.replace("{}", b.subject) for a, b in zip(task.val.texts, task.val.facts, strict=True)):
        raise DataError(f"The prompts of this task are not {task.template!r} alone, so that they have no other words.")
    parts = {name: getattr(task, name) for name in ("val", "test", "reference")}
    rows: dict[Fact, int] = {}
    for prompts in parts.values():
        for fact in prompts.facts:
            rows.setdefault(fact, len(rows))
    everything = encode(model, list(rows), template, task.relation.objects, task.seed)
    asked = {}
    for name, prompts in parts.items():
        same = {field: getattr(prompts, field) for field in ("foils", "more_foils", "compared")}
        asked[name] = replace(everything.select([rows[fact] for fact in prompts.facts]), **same)
    return replace(task, template=template, **asked)


def with_other_partners(task: Task, seed: int) -> Task:
    """The task with the corrupted partners of D_val drawn anew.

    They are drawn from all of its prompts that are as long and begin alike up to the subject: after the same
    demonstrations, where there are any. Prompts that bring their own corrupted one keep it.
    """
    parts = (task.val, task.test, task.reference)
    pool = [row for part in parts for row in zip(*_tokens(part), part.subject_start.tolist(), strict=True)]
    prompts, firsts = [prompt for prompt, _, _ in pool], [first for part in parts for first in part.firsts]
    alike = [(len(prompt), prompt[:start]) for prompt, _, start in pool]
    drawn = draw_partners(alike, prompts, firsts, random.Random(seed))[: len(task.val)]
    old, given = _corrupted(task.val), [bool(fact.corrupted) for fact in task.val.facts]
    partners = [old[i] if partner is None or given[i] else prompts[partner] for i, partner in enumerate(drawn)]
    paired = [one is not None for one in partners]
    own, answers = _tokens(task.val)
    corrupted = [(other or prompt) + answer[:-1] for other, prompt, answer in zip(partners, own, answers, strict=True)]
    device = task.val.tokens.device
    val = replace(task.val, corrupted=padded(corrupted, device), paired=torch.tensor(paired, device=device))
    return replace(task, val=val)


def with_shuffled_answers(model: Model, task: Task, seed: int) -> Task:
    """The task with D_val's answers dealt out anew, so that no fact keeps an answer that starts as its own.

    Whatever a method finds on it, the model's knowledge of these facts is not in it. Several right answers, and wrong
    ones, are dealt together.

    Raises
    ------
    DataError
        If there is no such deal: more than half of the answers start alike.
    """
    val = task.val
    order = _derangement(val.firsts, random.Random(seed), task)
    prompts, answers = _tokens(val)
    dealt = [answers[i] for i in order]
    device = val.tokens.device
    pad = partial(padded, device=device)
    partners = [other or prompt for other, prompt in zip(_corrupted(val), prompts, strict=True)]
    facts = [
        replace(fact, **{name: getattr(val.facts[i], name) for name in ("object", "also", "wrong")})
        for fact, i in zip(val.facts, order, strict=True)
    ]
    bring = torch.tensor([bool(a.wrong or b.wrong) for a, b in zip(facts, val.facts, strict=True)], device=device)
    taken = (val.foils[:, None] == val.right[order, 0]).any(-1)
    new = replace(
        val,
        facts=tuple(facts),
        tokens=pad([prompt + answer[:-1] for prompt, answer in zip(prompts, dealt, strict=True)]),
        answers=val.answers[order],
        answer_mask=val.answer_mask[order],
        foils=torch.where(bring, val.foils[order], torch.where(taken, val.answers[:, 0], val.foils)),
        decides=val.decides[order],
        also=val.also[order],
        more_foils=val.more_foils[order],
        compared=val.compared[order],
        corrupted=pad([other + answer[:-1] for other, answer in zip(partners, dealt, strict=True)]),
    )
    return replace(task, val=replace(new, ranks=full_ranks(model, new, False)))


def _derangement(firsts: Sequence[set[int]], draw: random.Random, task: Task) -> list[int]:
    """A random order in which no place has a token that is its own: shuffled, then mended by swaps."""

    def apart(i: int, j: int) -> bool:
        return firsts[i].isdisjoint(firsts[j])

    order = list(range(len(firsts)))
    draw.shuffle(order)
    for i in range(len(firsts)):
        if not apart(order[i], i):
            swaps = [j for j in range(len(firsts)) if apart(order[j], i) and apart(order[i], j)]
            if not swaps:
                said = f"{task.val.facts[i].object!r:.60}"
                why = f"have a right answer of {said}'s" if task.val.facts[i].also else f"start as {said} does"
                raise DataError(
                    f"The answers of {task.relation.name} cannot be shuffled: more than half of them {why}."
                )
            j = draw.choice(swaps)
            order[i], order[j] = order[j], order[i]
    return order


def _tokens(prompts: Prompts) -> tuple[list[list[int]], list[list[int]]]:
    """Each prompt's own tokens, and its answer's."""
    return prompts.own, _beginnings(prompts.answers, prompts.answer_mask.sum(1))


def _corrupted(prompts: Prompts) -> list[list[int] | None]:
    """Each prompt's corrupted partner without the answer; None where it has none."""
    found = _beginnings(prompts.corrupted, prompts.lengths)
    return [one if paired else None for one, paired in zip(found, prompts.paired.tolist(), strict=True)]


def _beginnings(rows: Int[Tensor, "N T"], lengths: Int[Tensor, " N"]) -> list[list[int]]:
    return [row[:length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]
