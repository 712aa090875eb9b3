"""Facts become prompts with their answers, as tensors.

Prompts of unequal length are padded on the right and each has its own answer positions: a causal model never looks
right, so no mask is involved and results equal the unpadded ones. A prompt is followed by its answer's tokens but the
last (teacher forcing), so that each answer token is predicted at its own position.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kcwb.errors import DataError
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.models.memory import in_pieces
from kcwb.progress import Progress, track
from kcwb.tasks.ranks import rank_of_best, rank_product
from kcwb.tasks.relations import Fact
from kcwb.tasks.tokens import Objects, PromptTokens, deciding_places, encode_one, objects_after, padded
from kcwb.verbs import verb

#: A fact is known when the model gives its answer at most this rank (`kcwb.tasks.ranks`).
KNOWN_RANK = 10
_CHUNK = 16


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts with their answers, as tensors on the model's device.

    Attributes
    ----------
    facts, texts
        What each prompt asks, and how.
    tokens
        `[N, T]`: the prompt, then its answer's tokens but the last, then padding.
    lengths
        `[N]`: how many tokens the prompt itself has; its last one is END.
    subject_start, subject_stop
        `[N]`: the subject's tokens are `tokens[n, start:stop]`.
    answers, answer_mask
        `[N, A]`: the answer's tokens, and which of them are not padding.
    foils
        `[N]`: the first token of another object, for `logit_diff`; -1 where the relation has none.
    decides
        `[N]`: which of the answer's tokens, from 0, is the first to tell it apart from the relation's other objects; -1
        where none does.
    ranks
        `[N]`: the full model's rank of the answer, from 1: see `kcwb.tasks.ranks`.
    corrupted
        `[N, T]`: the same with the subject of another fact whose prompt has as many tokens and another answer.
    paired
        `[N]`: False where there is no such fact.
    also
        `[N, R]`: the last tokens of other right answers, which have all tokens before in common with the first; -1
        where there are fewer than R. R is 0 where each prompt has one right answer.
    more_foils
        `[N, F]`: further tokens that are wrong where `foils` is; -1 as above, F is 0 where one is enough.
    compared
        `[N]`: at which of the answer's tokens `logit_diff` compares with foils: of prompts that bring their own wrong
        answers at the one that decides, of others at the first.

    A corrupted prompt that a fact brings itself (`kcwb.tasks.relations.Fact.corrupted`) takes the place of another
    fact's, and is no partner unless it has as many tokens.
    """

    facts: tuple[Fact, ...]
    texts: tuple[str, ...]
    tokens: Int[Tensor, "N T"]
    lengths: Int[Tensor, " N"]
    subject_start: Int[Tensor, " N"]
    subject_stop: Int[Tensor, " N"]
    answers: Int[Tensor, "N A"]
    answer_mask: Bool[Tensor, "N A"]
    foils: Int[Tensor, " N"]
    decides: Int[Tensor, " N"]
    ranks: Int[Tensor, " N"]
    corrupted: Int[Tensor, "N T"]
    paired: Bool[Tensor, " N"]
    also: Int[Tensor, "N R"]
    more_foils: Int[Tensor, "N F"]
    compared: Int[Tensor, " N"]

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.facts)

    @property
    def right(self) -> Int[Tensor, "N A K"]:
        """The tokens that are right at each of the answer's: one but for the last of several answers; -1 for none."""
        steps = torch.arange(self.answers.shape[1], device=self.tokens.device)
        last = steps == self.answer_mask.sum(1, keepdim=True) - 1
        also = self.also[:, None].expand(-1, len(steps), -1).masked_fill(~last[..., None], -1)
        return torch.cat([self.answers[..., None], also], -1)

    @property
    def firsts(self) -> list[set[int]]:
        """The tokens that a right answer may begin with, of each prompt."""
        return [{token for token in row if token >= 0} for row in self.right[:, 0].tolist()]

    @property
    def all_foils(self) -> Int[Tensor, "N K"]:
        """`foils` and `more_foils`."""
        return torch.cat([self.foils[:, None], self.more_foils], -1)

    @property
    def further(self) -> tuple[Tensor, ...]:
        """What prompts of plain facts do not have, for digests: nothing of those."""
        plain = not self.also.numel() and not self.more_foils.numel() and not bool(self.compared.any())
        return () if plain else (self.also, self.more_foils, self.compared)

    @property
    def own(self) -> list[list[int]]:
        """Each prompt's own tokens, without its answer's."""
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    @property
    def ends(self) -> Int[Tensor, " N"]:
        """The position of END, each prompt's last token: where the answer's first token is predicted."""
        return self.lengths - 1

    @property
    def positions(self) -> Int[Tensor, "N A"]:
        """Where each answer token is predicted; padding repeats END."""
        steps = torch.arange(self.answers.shape[1], device=self.tokens.device)
        return self.ends[:, None] + steps * self.answer_mask

    @property
    def known(self) -> Bool[Tensor, " N"]:
        """Which answers the full model ranks among the first ten."""
        return self.ranks <= KNOWN_RANK

    @property
    def told_at_end(self) -> Bool[Tensor, " N"]:
        """Which answers are told apart by their first token, the one that is predicted at END."""
        return self.decides == 0

    def select(self, rows: Sequence[int] | slice) -> Prompts:
        """Some of the prompts, without the columns of padding that they do not need."""
        rows = range(len(self))[rows] if isinstance(rows, slice) else rows
        chosen = select_rows(self, rows)
        width = max(1, int(chosen["answer_mask"].sum(1).max())) if rows else 1
        used = (chosen["lengths"] + chosen["answer_mask"].sum(1) - 1).max() if rows else 0
        for name in ("answers", "answer_mask"):
            chosen[name] = chosen[name][:, :width]
        for name in ("tokens", "corrupted"):
            chosen[name] = chosen[name][:, : int(used)]
        return Prompts(**chosen)


def select_rows(prompts: Any, rows: Sequence[int]) -> dict[str, Any]:
    """Each field of a dataclass of tensors and tuples, at some of its rows."""
    index = torch.as_tensor(list(rows), dtype=torch.long, device=prompts.tokens.device)
    values = {field.name: getattr(prompts, field.name) for field in fields(prompts)}
    return {
        name: value[index] if isinstance(value, Tensor) else tuple(value[i] for i in rows)
        for name, value in values.items()
    }


@verb
def encode(
    model: Model,
    facts: Sequence[Fact],
    template: str,
    objects: Sequence[str],
    seed: int = 0,
    foil: str | None = None,
    progress: Progress = False,
) -> Prompts:
    """Prompts of all `facts` in one template; see `make_task`.

    `objects` are all objects of the relation: what answers are told apart from, and what foils are drawn from.
    """
    rows = [encode_one(model, fact, template) for fact in facts]
    draw = random.Random(seed)
    tokens = objects_after(model, template, facts, objects)
    named = objects_after(model, template, facts, [foil]) if foil else tokens
    firsts = {space: [answer[0] for answer in some.values()] for space, some in named.items()}
    foils = [
        None if fact.wrong and foil is None else _foil(row, fact, firsts[fact.space], foil, draw)
        for row, fact in zip(rows, facts, strict=True)
    ]
    own = [row.prompt for row in rows]
    partners = draw_partners([*map(len, own)], own, [row.firsts for row in rows], draw)
    width = max(len(row.prompt) + len(row.answer) - 1 for row in rows)
    if width > model.network.n_ctx:
        raise DataError(f"A prompt of {template!r} has {width} tokens; {model.name} reads {model.network.n_ctx}.")
    texts = [template.replace("{}", fact.subject) for fact in facts]
    others = [None if partner is None else rows[partner].prompt for partner in partners]
    for i, row in enumerate(rows):
        if row.corrupted is not None:
            differs = row.corrupted != row.prompt and len(row.corrupted) == len(row.prompt)
            others[i] = row.corrupted if differs else None
    return assemble(model, facts, texts, rows, tokens, foils, others, progress)


def assemble(
    model: Model,
    facts: Sequence[Fact],
    texts: Sequence[str],
    rows: Sequence[PromptTokens],
    objects: Objects,
    foils: Sequence[int | None],
    partners: Sequence[list[int] | None],
    progress: Progress = False,
) -> Prompts:
    """Prompts out of the tokens of each (`encode_one`), with the full model's ranks.

    `objects` are all objects of the relation (`objects_after`); `partners` the tokens of the prompts, each as long as
    its own, that are to be the corrupted ones. A foil of None: the prompt's own wrong answers are its foils.
    """
    pad, column = partial(padded, device=model.device), partial(torch.tensor, device=model.device)
    answers = [row.answer for row in rows]
    decides = deciding_places(facts, rows, objects)
    compared = [max(0, place) if foil is None else 0 for place, foil in zip(decides, foils, strict=True)]
    own = [
        _own_foils(row, place) if foil is None else [foil]
        for row, place, foil in zip(rows, compared, foils, strict=True)
    ]
    prompts = Prompts(
        facts=tuple(facts),
        texts=tuple(texts),
        tokens=pad([row.prompt + row.answer[:-1] for row in rows]),
        lengths=column([len(row.prompt) for row in rows]),
        subject_start=column([row.start for row in rows]),
        subject_stop=column([row.stop for row in rows]),
        answers=pad(answers),
        answer_mask=pad([[1] * len(answer) for answer in answers]).bool(),
        foils=column([some[0] for some in own]),
        decides=column(decides),
        ranks=column([0] * len(rows)),
        corrupted=pad([(other or row.prompt) + row.answer[:-1] for row, other in zip(rows, partners, strict=True)]),
        paired=column([other is not None for other in partners]),
        also=column(even([row.also for row in rows]), dtype=torch.long),
        more_foils=column(even([some[1:] for some in own]), dtype=torch.long),
        compared=column(compared),
    )
    return replace(prompts, ranks=full_ranks(model, prompts, progress))


def draw_partners(
    alike: Sequence[Any], prompts: Sequence[list[int]], firsts: Sequence[set[int]], draw: random.Random
) -> list[int | None]:
    """For each prompt another one that is `alike`, of other tokens, and whose answers start otherwise; or None."""
    found: list[int | None] = []
    for own, prompt, first in zip(alike, prompts, firsts, strict=True):
        others = [i for i, one in enumerate(alike) if one == own and firsts[i].isdisjoint(first)]
        others = [i for i in others if prompts[i] != prompt]
        found.append(draw.choice(others) if others else None)
    return found


def _foil(row: PromptTokens, fact: Fact, first: Sequence[int], named: str | None, draw: random.Random) -> int:
    others = [token for token in first if token not in row.firsts]
    if named and not others:
        raise DataError(
            f"The foil {named!r:.60} starts with the same token as the answer {fact.object!r:.60} of "
            f"{fact.subject!r:.60}; choose another."
        )
    return draw.choice(others) if others else -1


def _own_foils(row: PromptTokens, place: int) -> list[int]:
    """What wrong answers have at a place where they begin as the right one does up to it, or -1 if none does."""
    right = {answer[place] for answer in row.right}
    found = [wrong[place] for wrong in row.wrong.values() if wrong[:place] == row.answer[:place] and len(wrong) > place]
    return [token for token in dict.fromkeys(found) if token not in right] or [-1]


def even(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows made as long as the longest by -1."""
    width = max(map(len, rows))
    return [[*row, *[-1] * (width - len(row))] for row in rows]


def known_rows(model: Any, ranks: Int[Tensor, " N"], asked: str, how: str = "") -> list[int]:
    """The rows of facts that a model knows; DataError if there are none, with what was asked and how."""
    rows = (ranks <= KNOWN_RANK).nonzero()[:, 0].tolist()
    if not rows:
        raise DataError(
            f"{model.name} knows none of the {len(ranks)} facts of {asked} (Hit@{KNOWN_RANK}{how}); the best rank is "
            f"{int(ranks.min())}. Try another template or relation."
        )
    return rows


@torch.no_grad()
def full_ranks(model: Model, prompts: Prompts, progress: Progress) -> Int[Tensor, " N"]:
    """The full model's rank of each answer; see `kcwb.tasks.ranks`."""
    steps = torch.arange(max(1, int(prompts.decides.max()) + 1), device=model.device)
    right = prompts.right

    def work(rows: slice) -> Tensor:
        residual = forward(model.network, prompts.tokens[rows]).residual
        row, place = (steps <= prompts.decides[rows, None]).nonzero(as_tuple=True)
        logits = model.network.logits(residual[row, prompts.positions[rows][row, place]])
        of_tokens = torch.ones(len(residual), len(steps), dtype=torch.long, device=model.device)
        of_tokens[row, place] = rank_of_best(logits, right[rows][row, place])
        step(len(residual))
        return rank_product(of_tokens, prompts.decides[rows])

    with track(progress, len(prompts), "facts") as step:
        return torch.cat([*in_pieces(len(prompts), _CHUNK, work)])
