"""The rank of an answer of several tokens, and which token tells it apart from the relation's other objects.

All years of a century begin with the same token, and all Cyrillic capitals of a letter with the same byte: to rank that
token high is to know nothing. So an answer is judged as far as the token that **decides**, the first by which it is
told apart from every other object of its relation, and its **rank** is the product of the ranks of its tokens up to
that one, each after the right ones before it (teacher forcing). Where the first token decides, that is its plain rank.

Why the product, and not the rank at the deciding token alone: among ten digits, or the few bytes that may follow
another, every token is among the first ten. The product counts the beginnings of that length of which every token
stands at least as high in its place, so that "among the first ten" stays as strict as it is of a single token.

Of several right answers, which have all tokens but their last in common, the rank is that of the best one, against
which the others do not count: they are right too. Which wrong answers there are can be said of each prompt; then those
are what its answer is told apart from.

An object whose tokens all begin another object's (S and Si), or are the same (unknown characters), is told apart by no
token; its rank is `WORST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: The deciding token of an answer that no token tells apart.
NEVER = -1
#: Where ranks end: products that are larger, and answers that no token tells apart.
WORST = 10**9


def deciding_tokens(
    names: Sequence[str], answers: Sequence[Sequence[int]], objects: Mapping[str, Sequence[int]]
) -> list[int]:
    """For each answer the index of the first token that tells it apart from all objects of other names, or `NEVER`.

    Parameters
    ----------
    names, answers
        What each answer is called, and its tokens.
    objects
        The tokens of every object of the relation, by name, as they follow the prompt.
    """
    known = beginnings(objects)
    return [decides(tokens, known, {name}) for name, tokens in zip(names, answers, strict=True)]


def beginnings(objects: Mapping[str, Sequence[int]]) -> dict[tuple[int, ...], set[str]]:
    """All that objects begin with, and which of them do."""
    found: dict[tuple[int, ...], set[str]] = {}
    for name, tokens in objects.items():
        for stop in range(1, len(tokens) + 1):
            found.setdefault(tuple(tokens[:stop]), set()).add(name)
    return found


def decides(answer: Sequence[int], others: Mapping[tuple[int, ...], set[str]], own: set[str]) -> int:
    """The first token that tells an answer apart from others (their `beginnings`) but its own names; or `NEVER`."""
    return next((i for i in range(len(answer)) if not others.get(tuple(answer[: i + 1]), set()) - own), NEVER)


def rank_of(logits: Float[Tensor, "... V"], token: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The rank of a token, from 1; ties count against it, as do NaNs: such logits know nothing."""
    own = logits.gather(-1, token[..., None])
    return (~(logits < own)).sum(-1)


def rank_of_best(logits: Float[Tensor, "... V"], tokens: Int[Tensor, "... K"]) -> Int[Tensor, "..."]:
    """The `rank_of` the best of some tokens, against which the others do not count; -1 stands for none."""
    real = tokens >= 0
    own = logits.gather(-1, tokens.clamp(min=0)).masked_fill(~real, -torch.inf)
    best = own.amax(-1, keepdim=True)
    return (~(logits < best)).sum(-1) - (~(own < best) & real).sum(-1) + 1


def best_right_and_wrong(logits: Float[Tensor, "N V"], right: Int[Tensor, "N K"]) -> Int[Tensor, "N 2"]:
    """The likeliest of each row's right tokens, and of all others; -1 stands for none, but not in the first place."""
    right = torch.where(right < 0, right[:, :1], right)
    best = right.gather(-1, logits.gather(-1, right).argmax(-1, keepdim=True))
    return torch.cat([best, logits.scatter(-1, right, -torch.inf).argmax(-1, keepdim=True)], -1)


def rank_product(ranks: Int[Tensor, "... N A"], decides: Int[Tensor, " N"]) -> Int[Tensor, "... N"]:
    """The rank of each answer from those of its tokens (see the top of this module), at most `WORST`."""
    product = torch.full_like(ranks[..., 0], 1)
    for i, of_token in enumerate(ranks.unbind(-1)):
        product = torch.where(i <= decides, product * of_token, product).clamp(max=WORST)
    return product.masked_fill(decides == NEVER, WORST)
