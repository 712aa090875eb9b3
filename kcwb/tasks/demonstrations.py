"""What can stand before a question: demonstrations, the same with one another's objects, or unrelated text."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import linear_sum_assignment

from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.tasks.relations import Fact, Relation, load_relations
from kcwb.tasks.tokens import encode_one

#: What a token before END can belong to, see `kcwb.tasks.shots.ShotTask.groups`.
GROUPS = ("object", "subject", "separator", "words", "first", "question")
_TRIES = 200
_SEPARATOR = "\n"


@dataclass(frozen=True)
class Context:
    """What stands before a question.

    Attributes
    ----------
    text
        Lines, each with its line break; empty for no shot.
    shown
        The demonstrations as they are written, with each other's objects where they are shuffled; none for unrelated
        text.
    spans
        (group, start, stop) in characters: where objects, subjects and separators stand.
    """

    text: str
    shown: tuple[Fact, ...] = ()
    spans: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, facts: Sequence[Fact], template: str) -> Context:
        """Demonstrations, one a line, and where their parts stand."""
        text, spans = "", []
        for fact in facts:
            start = len(text) + template.index("{}")
            text += _line(fact, template)
            spans += [
                ("subject", start, start + len(fact.subject)),
                ("object", len(text) - len(fact.object), len(text)),
                ("separator", len(text), len(text) + len(_SEPARATOR)),
            ]
            text += _SEPARATOR
        return cls(text, tuple(facts), tuple(spans))

    def group(self, start: int, stop: int) -> str:
        """What a token belongs to that covers these characters; the first in `GROUPS` of two that it touches."""
        if start >= len(self.text):
            return "question"
        touched = {group for group, a, b in self.spans if start < b and stop > a}
        return next((group for group in GROUPS if group in touched), "words")


def _line(fact: Fact, template: str) -> str:
    return f"{template.replace('{}', fact.subject)}{' ' if fact.space else ''}{fact.object}"


def deranged(facts: Sequence[Fact], relation: Relation, draw: random.Random) -> list[Fact]:
    """The same subjects with one another's objects, none with its own.

    Where that cannot be (a single fact, or most have the same object), what is left over gets another object of the
    relation.
    """
    cost = [[draw.random() + len(facts) * (b.object in a.right) for b in facts] for a in facts]
    given = [facts[j].object for j in linear_sum_assignment(cost)[1]]
    wrong = []
    for fact, name in zip(facts, given, strict=True):
        others = [other for other in relation.objects if other not in fact.right]
        if not others:
            raise DataError(
                f"All {len(relation.facts)} facts of {relation.name} have the object {fact.object!r:.60}: its labels "
                "cannot be shuffled."
            )
        chosen = draw.choice(others) if name in fact.right else name
        wrong.append(Fact(fact.subject, chosen, space=fact.space))
    return wrong


class UnrelatedText:
    """Sentences of other relations that name nothing of one relation, put together to any number of tokens.

    Parameters
    ----------
    model, relation, question
        Whose tokens count, what is not to be named, and the template that follows.
    others
        The relations whose sentences are used; None for all others that come with the package.

    Raises
    ------
    DataError
        If each of their sentences names something of the relation.
    """

    def __init__(self, model: Model, relation: Relation, question: str, others: Sequence[Relation] | None) -> None:
        self._model, self._question = model, question
        others = load_relations() if others is None else others
        names = {name for fact in relation.facts for name in (fact.subject, *fact.right)}
        named = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(names)))})(?!\w)", re.IGNORECASE)
        found = []
        for other in others:
            if other.name != relation.name:
                lines = [_line(fact, other.prompt_templates[0]) for fact in other.facts]
                found.append([line for line in lines if not named.search(line) and "{}" not in line])
        self._by_relation = [lines for lines in found if lines]
        if not self._by_relation:
            raise DataError(
                f"Each sentence of the {len(others)} relations that unrelated text could be made of names something of "
                f"{relation.name}. Give others: unrelated=[...]."
            )

    def like(self, text: str, facts: Sequence[Fact], key: str) -> Context:
        """Other text that takes exactly as many tokens before the facts' questions as `text` does.

        Sentences are put together until they are long enough; then words are taken away at the front.
        """
        draw = random.Random(key)
        wanted = [self._count(text, fact) for fact in facts]
        for _ in range(_TRIES):
            other = ""
            for sentences in itertools.cycle(draw.sample(self._by_relation, len(self._by_relation))):
                other = draw.choice(sentences) + _SEPARATOR + other
                if self._count(other, facts[0]) >= wanted[0]:
                    break
            first_line = other.index(_SEPARATOR)
            for start in (0, *(match.end() for match in re.finditer(" +", other[:first_line]))):
                cut = other[start:]
                if all(self._count(cut, fact) == n for fact, n in zip(facts, wanted, strict=True)):
                    breaks = re.finditer(_SEPARATOR, cut)
                    return Context(cut, (), tuple(("separator", one.start(), one.end()) for one in breaks))
        raise DataError(
            f"No text of exactly {wanted[0]} tokens, the question included, could be made of the sentences of "
            f"{len(self._by_relation)} other relations in {_TRIES} tries. Give others: unrelated=[...]."
        )

    def _count(self, context: str, fact: Fact) -> int:
        return len(encode_one(self._model, fact, context + self._question).prompt)
