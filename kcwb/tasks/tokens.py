"""Texts as tokens: one prompt with its answer and its subject's span, and what tells answers apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.tasks.ranks import NEVER, deciding_tokens
from kcwb.tasks.relations import Fact, Relation


class PromptTokens(NamedTuple):
    """A prompt's tokens, its answer's, and where among the former the subject's start and stop."""

    prompt: list[int]
    answer: list[int]
    start: int
    stop: int


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "N T"]:
    """Rows of unequal length, filled up with zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def encode_one(model: Model, fact: Fact, template: str) -> PromptTokens:
    """Tokens of one prompt and answer, and the subject's span among them by character offsets."""
    text = template.replace("{}", fact.subject)
    encoding: Any = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = template.index("{}")
    stop = start + len(fact.subject)
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < stop and b > start]
    if not inside:
        raise DataError(f"The subject {fact.subject!r:.60} has no token of its own in {text!r:.120}.")
    bos: list[Any] = [model.tokenizer.bos_token_id] if model.prepend_bos else []
    return PromptTokens(
        prompt=bos + list(encoding["input_ids"]),
        answer=answer_tokens(model, template, fact.subject, fact.object),
        start=inside[0] + len(bos),
        stop=inside[-1] + 1 + len(bos),
    )


def answer_tokens(model: Model, template: str, subject: str, answer: str) -> list[int]:
    """Tokens of " answer" as they follow the prompt, which must keep its own tokens before them."""
    return object_tokens(model, template, subject, [answer])[answer]


def object_tokens(model: Model, template: str, subject: str, objects: Iterable[str]) -> dict[str, list[int]]:
    """The `answer_tokens` of many answers to one prompt, by name."""
    names = list(dict.fromkeys(objects))
    text = template.replace("{}", subject)
    prompt, *wholes = model.tokenizer([text, *(f"{text} {name}" for name in names)], add_special_tokens=False).input_ids
    for name, whole in zip(names, wholes, strict=True):
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise DataError(f"The answer {name!r:.60} runs into the last token of {text!r:.120}. Use another template.")
    return {name: list(whole[len(prompt) :]) for name, whole in zip(names, wholes, strict=True)}


def told_apart(model: Model, facts: Sequence[Fact], template: str, relation: Relation) -> list[Fact]:
    """The facts whose object some token tells apart from the relation's other objects; warns of the others.

    Raises
    ------
    DataError
        If none is left.
    """
    tokens = object_tokens(model, template, facts[0].subject, relation.objects)
    decides = dict(zip(tokens, deciding_tokens([*tokens], [*tokens.values()], tokens), strict=True))
    kept = [fact for fact in facts if decides[fact.object] != NEVER]
    if len(kept) == len(facts):
        return kept
    alike = ", ".join(f"{name!r:.60}" for name, place in decides.items() if place == NEVER)
    words = (
        f"{len(facts) - len(kept)} of {len(facts)} facts of {relation.name} have an object whose tokens all begin "
        f"another object's, so that nothing tells whether it is meant ({alike:.300})"
    )
    if not kept:
        raise DataError(f"{words}. No fact is left; {model.name}'s tokenizer cannot tell these objects apart.")
    warnings.warn(f"{words}: left out.", stacklevel=3)
    return kept
