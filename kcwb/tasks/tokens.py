"""Texts as tokens: one prompt with its answer and its subject's span, and what tells answers apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kcwb.errors import DataError, warn
from kcwb.models.loading import Model
from kcwb.tasks.ranks import NEVER, beginnings, decides
from kcwb.tasks.relations import Fact, Relation


class PromptTokens(NamedTuple):
    """A prompt's tokens, its answer's, and where among the former the subject's start and stop.

    `also` are the last tokens of other right answers, which have those before in common with the first one; `wrong` the
    tokens of the prompt's own wrong answers, by name; `corrupted` those of its own corrupted prompt.
    """

    prompt: list[int]
    answer: list[int]
    start: int
    stop: int
    also: tuple[int, ...] = ()
    wrong: Mapping[str, list[int]] = MappingProxyType({})
    corrupted: list[int] | None = None

    @property
    def right(self) -> list[list[int]]:
        """The tokens of every right answer."""
        return [self.answer, *([*self.answer[:-1], last] for last in self.also)]

    @property
    def firsts(self) -> set[int]:
        """The tokens that a right answer may begin with."""
        return {answer[0] for answer in self.right}


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "N T"]:
    """Rows of unequal length, filled up with zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def text_tokens(model: Model, text: str) -> list[int]:
    """The tokens of a text, after BOS where the model's prompts have one; DataError if there are none."""
    found = located_tokens(model, text, 0, 0)[0]
    if not found:
        raise DataError(f"The text {text!r:.60} has no token, after which {model.name} could go on.")
    return found


def located_tokens(model: Model, text: str, start: int, stop: int) -> tuple[list[int], int, int]:
    """The `text_tokens`, and from and to which of them some of its characters stand; 0 and 0 if in none."""
    encoding: Any = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    bos: list[Any] = [model.tokenizer.bos_token_id] if model.prepend_bos else []
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"], len(bos)) if a < stop and b > start]
    first, last = (inside[0], inside[-1]) if inside else (0, -1)
    return bos + list(encoding["input_ids"]), first, last + 1


def encode_one(model: Model, fact: Fact, template: str) -> PromptTokens:
    """Tokens of one prompt and answer, and the subject's span among them by character offsets."""
    text, at = template.replace("{}", fact.subject), template.index("{}")
    before, after = fact.span or (0, len(fact.subject))
    prompt, start, stop = located_tokens(model, text, at + before, at + after)
    if not stop and fact.named:
        raise DataError(f"The subject {fact.named!r:.60} has no token of its own in {text!r:.120}.")
    answers = object_tokens(model, template, fact.subject, (*fact.right, *fact.wrong), fact.space)
    return PromptTokens(
        prompt=prompt,
        answer=answers[fact.object],
        start=start,
        stop=stop,
        also=_last_tokens(fact, answers, text),
        wrong={name: answers[name] for name in fact.wrong},
        corrupted=text_tokens(model, template.replace("{}", fact.corrupted)) if fact.corrupted else None,
    )


def _last_tokens(fact: Fact, answers: Mapping[str, list[int]], text: str) -> tuple[int, ...]:
    """The last tokens of other right answers, each once; DataError if one differs from the first in more than that."""
    first = answers[fact.object]
    for name in fact.also:
        if answers[name][:-1] != first[:-1]:
            raise DataError(
                f"{text!r:.120}: the right answers {fact.object!r:.40} ({len(first)} tokens) and {name!r:.40} "
                f"({len(answers[name])}) do not have all tokens but the last one in common, so that no place tells "
                "whether one of them is given. Leave one out, or shorten both to what they begin with."
            )
    return tuple(dict.fromkeys(answers[name][-1] for name in fact.also if answers[name] != first))


def answer_tokens(model: Model, template: str, subject: str, answer: str, space: bool = True) -> list[int]:
    """Tokens of " answer" as they follow the prompt, which must keep its own tokens before them."""
    return object_tokens(model, template, subject, [answer], space)[answer]


def object_tokens(
    model: Model, template: str, subject: str, objects: Iterable[str], space: bool = True
) -> dict[str, list[int]]:
    """The `answer_tokens` of many answers to one prompt, by name; without `space` they follow it at once."""
    names = list(dict.fromkeys(objects))
    text = template.replace("{}", subject)
    joint = " " if space else ""
    texts = [text, *(f"{text}{joint}{name}" for name in names)]
    prompt, *wholes = model.tokenizer(texts, add_special_tokens=False).input_ids
    for name, whole in zip(names, wholes, strict=True):
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise DataError(
                f"The answer {name!r:.60} runs into the last token of {text!r:.120}. Use another template, or end the "
                "prompt otherwise."
            )
    return {name: list(whole[len(prompt) :]) for name, whole in zip(names, wholes, strict=True)}


#: Objects' tokens by name, as they follow prompts with a space before them (True), and as they do without.
Objects = Mapping[bool, Mapping[str, Sequence[int]]]


def objects_after(model: Model, template: str, facts: Sequence[Fact], objects: Iterable[str]) -> Objects:
    """The `object_tokens` of a relation as they follow the prompts of some facts; the first of each kind serves all."""
    first, names = {fact.space: fact.subject for fact in reversed(facts)}, list(objects)
    return {space: object_tokens(model, template, subject, names, space) for space, subject in first.items()}


def deciding_places(facts: Sequence[Fact], rows: Sequence[PromptTokens], objects: Objects) -> list[int]:
    """For each fact the index of the first token that tells its answer apart (`kcwb.tasks.ranks`), or `NEVER`.

    It is told apart from its own wrong answers where it has some, else from the relation's other objects.
    """
    known, places = {space: beginnings(some) for space, some in objects.items()}, []
    for fact, row in zip(facts, rows, strict=True):
        others, own = (beginnings(row.wrong), {fact.object}) if row.wrong else (known[fact.space], set(fact.right))
        found = [decides(answer, others, own) for answer in row.right]
        places.append(NEVER if NEVER in found else max(found))
    return places


def told_apart(model: Model, facts: Sequence[Fact], template: str, relation: Relation) -> list[Fact]:
    """The facts whose object some token tells apart from the relation's other objects; warns of the others.

    Raises
    ------
    DataError
        If none is left.
    """
    tokens = objects_after(model, template, facts, relation.objects)
    places = deciding_places(facts, [encode_one(model, fact, template) for fact in facts], tokens)
    kept = [fact for fact, place in zip(facts, places, strict=True) if place != NEVER]
    if len(kept) == len(facts):
        return kept
    names = dict.fromkeys(fact.object for fact, place in zip(facts, places, strict=True) if place == NEVER)
    alike = ", ".join(f"{name!r:.60}" for name in names)
    words = (
        f"{len(facts) - len(kept)} of {len(facts)} facts of {relation.name} have an object whose tokens all begin "
        f"another object's, so that nothing tells whether it is meant ({alike:.300})"
    )
    if not kept:
        raise DataError(f"{words}. No fact is left; {model.name}'s tokenizer cannot tell these objects apart.")
    warn(f"{words}: left out.")
    return kept
