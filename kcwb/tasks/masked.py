"""A relation as an encoder meets it: its template, a mask where the object belongs, and a full stop.

    "The capital of {} is" -> "The capital of France is [MASK]."

A mask is one token, so only facts are asked whose object is one token there, and no other object's; the task says how
many are left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import DataError
from kcwb.models.encoder import Encoder, run_encoder
from kcwb.settings import Count, Seed
from kcwb.tasks.prompts import draw_partners, even, known_rows, select_rows
from kcwb.tasks.ranks import rank_of_best
from kcwb.tasks.relations import Fact, Relation, load_relation, require_subjects
from kcwb.tasks.task import split
from kcwb.tasks.tokens import padded
from kcwb.verbs import verb

_CHUNK = 32


@dataclass(frozen=True, eq=False)
class MaskedPrompts:
    """Prompts with one mask each, as tensors on the model's device.

    Attributes
    ----------
    facts, texts
        What each prompt asks, and how.
    tokens, real
        `[N, T]`: token ids, padded on the right, and which are not padding.
    masks, answers
        `[N]`: where the mask is, and the token that belongs there.
    right
        `[N, R]`: all tokens that may stand there, that one first; -1 where there are fewer than R.
    ranks
        `[N]`: the full model's rank of the answer, from 1.
    corrupted, paired
        `[N, T]`: the prompt of another fact, of as many tokens with the mask at the same place and another answer; and
        `[N]`, False where there is no such fact.
    """

    facts: tuple[Fact, ...]
    texts: tuple[str, ...]
    tokens: Int[Tensor, "N T"]
    real: Bool[Tensor, "N T"]
    masks: Int[Tensor, " N"]
    answers: Int[Tensor, " N"]
    right: Int[Tensor, "N R"]
    ranks: Int[Tensor, " N"]
    corrupted: Int[Tensor, "N T"]
    paired: Bool[Tensor, " N"]

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.facts)

    def select(self, rows: Sequence[int]) -> MaskedPrompts:
        """Some of the prompts, without the columns of padding that they do not need."""
        chosen = select_rows(self, rows)
        used = int(chosen["real"].sum(1).max()) if rows else 0
        for name in ("tokens", "real", "corrupted"):
            chosen[name] = chosen[name][:, :used]
        return MaskedPrompts(**chosen)


@dataclass(frozen=True, eq=False)
class MaskedTask:
    """A relation as an encoder meets it in one template; fields as in `kcwb.tasks.task.Task`.

    `n_facts` are the facts that are asked; `n_left_out` those whose object is not one token, or another object's.
    """

    model_name: str
    model_digest: str
    relation: Relation
    template: str
    n: int
    seed: int
    val: MaskedPrompts
    test: MaskedPrompts
    reference: MaskedPrompts
    n_known: int
    n_facts: int
    n_left_out: int

    def __repr__(self) -> str:
        """One line: relation, template and sizes."""
        return (
            f"MaskedTask({self.relation.name!r}, {self.template!r}: {len(self.val)} facts in D_val, {len(self.test)} "
            f"in D_test; {self.model_name} knows {self.n_known} of {self.n_facts}; {self.n_left_out} left out)"
        )


class _Row(NamedTuple):
    fact: Fact
    text: str
    tokens: list[int]
    mask: int
    right: list[int]


@verb
def make_masked_task(
    encoder: Encoder,
    relation: Relation | str,
    n: Count = 8,
    seed: Seed = 0,
    template: int | str = 0,
    ending: str = ".",
) -> MaskedTask:
    """Turn a relation into masked-token prompts: find the facts that the encoder knows, split, tokenise, pad.

    Parameters
    ----------
    encoder
        The model that is to know the facts.
    relation
        A Relation, the name of one that comes with the package, or the path of a file.
    n
        Facts in D_val; fewer if the model knows fewer, and never more than half of the facts that are asked.
    seed
        Of the draw of D_val, D_test and corrupted partners.
    template
        As in `make_task`: the mask follows it as the answer would.
    ending
        What follows the mask.

    Raises
    ------
    DataError
        If no object is one token of its own, the model knows none of the facts, or a prompt does not fit into the
        context.
    SettingError
        If `n` or `template` make no sense.
    """
    relation = load_relation(relation)
    require_subjects(relation, "A masked-token prompt")
    text = relation.template(template)
    found = [_row(encoder, fact, text, ending) for fact in relation.facts]
    objects = {(row.right[0], row.fact.object) for row in found if row is not None}
    times = Counter(answer for answer, _ in objects)
    rows = [row for row in found if row is not None and times[row.right[0]] == 1]
    if not rows:
        raise DataError(
            f"None of the {len(found)} objects of {relation.name} is one token of its own for {encoder.name} after "
            f"{text!r}, and a mask stands for one. Try another template, or a relation with shorter objects."
        )
    everything = _prompts(encoder, rows, seed)
    known = known_rows(encoder, everything.ranks, f"{relation.name} in {text!r}")
    return MaskedTask(
        model_name=encoder.name,
        model_digest=encoder.digest,
        relation=relation,
        template=text,
        n=n,
        seed=seed,
        **split(known, len(rows), n, seed).of(everything),
        n_known=len(known),
        n_facts=len(rows),
        n_left_out=len(found) - len(rows),
    )


def _row(encoder: Encoder, fact: Fact, template: str, ending: str) -> _Row | None:
    """Tokens of one prompt, and those that its mask may stand for; None if the object is not one token."""
    tokenizer: Any = encoder.tokenizer
    start = template.replace("{}", fact.subject) + (" " if fact.space else "")
    text = f"{start}{tokenizer.mask_token}{ending}"
    tokens = tokenizer(text).input_ids
    at = [i for i, token in enumerate(tokens) if token == tokenizer.mask_token_id]
    if len(at) != 1:
        raise DataError(f"{text!r:.120} has {len(at)} mask tokens; a masked-token prompt has one.")
    if len(tokens) > encoder.n_ctx:
        raise DataError(f"A prompt of {template!r} has {len(tokens)} tokens, and {encoder.name} reads {encoder.n_ctx}.")
    right: dict[str, int] = {}
    for name in fact.right:
        whole = tokenizer(f"{start}{name}{ending}").input_ids
        alone = len(whole) == len(tokens) and whole == [*tokens[: at[0]], whole[at[0]], *tokens[at[0] + 1 :]]
        if alone and whole[at[0]] != tokenizer.unk_token_id:
            right[name] = whole[at[0]]
    return _Row(fact, text, tokens, at[0], [*dict.fromkeys(right.values())]) if fact.object in right else None


def _prompts(encoder: Encoder, rows: list[_Row], seed: int) -> MaskedPrompts:
    shapes = [(len(row.tokens), row.mask) for row in rows]
    partners = draw_partners(shapes, [row.tokens for row in rows], [{*row.right} for row in rows], random.Random(seed))
    pad, column = partial(padded, device=encoder.device), partial(torch.tensor, device=encoder.device)
    tokens, real = pad([row.tokens for row in rows]), pad([[1] * len(row.tokens) for row in rows]).bool()
    masks, right, ranks = column([row.mask for row in rows]), column(even([row.right for row in rows])), []
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        logits = at_masks(run_encoder(encoder, tokens[part], real[part]), masks[part])
        ranks.append(rank_of_best(logits, right[part]))
    return MaskedPrompts(
        facts=tuple(row.fact for row in rows),
        texts=tuple(row.text for row in rows),
        tokens=tokens,
        real=real,
        masks=masks,
        answers=right[:, 0],
        right=right,
        ranks=torch.cat(ranks),
        corrupted=pad([rows[i if other is None else other].tokens for i, other in enumerate(partners)]),
        paired=column([other is not None for other in partners]),
    )


def at_masks(logits: Float[Tensor, "N T V"], masks: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
    """The logits at each prompt's mask."""
    return logits[torch.arange(len(logits), device=logits.device), masks]
