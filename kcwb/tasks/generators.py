"""Tasks of circuit research as tables of prompts, in words of our own: written by rule, the same for the same seed.

- `ioi_pairs`, indirect object identification (Wang et al., arXiv 2211.00593): "When Mary and John went to the park,
  John gave the book to" Mary, not John; corrupted (ABC): a third name gives.
- `greater_than_pairs`, years that are greater (Hanna et al., arXiv 2305.00586): "The war lasted from the year 1732 to
  the year 17" 4 to 9, not 0 to 2; corrupted: 1702.
- `docstring_pairs`, the parameter that is described next (Heimersheim and Janiak, 2023): after those of the first two
  the third of a definition; corrupted: the definition has other parameters.
- `addition_pairs`, sums of two two-digit numbers after three that are worked out; corrupted: other numbers.

Each corrupted prompt has as many tokens as its own, for tokenizers that read the names and words here as one token each
after a space, and numbers of the same length as as many tokens (tests hold SmolLM2's to it). Of 200 prompts each, seed
0, the built-in SmolLM2-135M ranks a right answer first, or among the first ten, and the right ones together above the
wrong ones (by `logit_diff`) in these shares:

                    first   first ten   right > wrong
    ioi             .89      .99         1.00
    greater-than    .41     1.00         1.00
    docstring       .97     1.00         1.00
    addition        .34      .96          .77   (with carry .57)

What a rank is where an answer has two digits: `kcwb.tasks.ranks`; there "among the first ten" is soon said.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pandas as pd

from kcwb.errors import SettingError
from kcwb.settings import Count, Seed
from kcwb.tasks.pairs import read_pairs
from kcwb.tasks.relations import Relation
from kcwb.verbs import verb


def _words(text: str) -> list[str]:
    return text.split()


_NAMES = _words(
    "Adam Alan Alex Alice Amy Anna Arthur Ben Brian Carl Charles Chris Claire Daniel David Diana Edward Emily Emma "
    "Eric Eva Frank George Grace Helen Henry Jack James Jane Jason John Julia Karen Kate Kevin Laura Leo Lily Linda "
    "Lisa Lucy Luke Maria Mark Martin Mary Michael Nina Oliver Oscar Paul Peter Rachel Robert Rose Ruth Ryan Sam Sarah "
    "Simon Sophie Susan Thomas Tom Victor William"
)
_PLACES = _words("beach garden library market museum office park river school station")
_THINGS = _words("ball basket book camera key lamp letter map picture ring")
#: {first} and {second} are the two names in either order, {giver} is one of them again.
_GIVING = (
    "When {first} and {second} went to the {place}, {giver} gave the {thing} to",
    "After {first} and {second} met at the {place}, {giver} handed a {thing} to",
    "Then {first} and {second} sat down at the {place}, and {giver} passed the {thing} to",
    "While {first} and {second} were waiting at the {place}, {giver} showed a {thing} to",
    "Because {first} and {second} had time, they met at the {place}, where {giver} lent a {thing} to",
)
_EVENTS = _words(
    "campaign dispute drought exhibition expedition famine journey project reign siege strike trial voyage war"
)
_LASTING = (
    "The {event} lasted from the year {century}{year} to the year {century}",
    "The {event} began in {century}{year} and ended in {century}",
    "The {event} that began in {century}{year} went on until {century}",
    "The {event} lasted from {century}{year} to {century}",
)
_VERBS = _words("count fetch filter find load merge parse read render save update write")
_PARAMETERS = _words(
    "angle color count date depth file group height index key label length level limit line list mode name offset "
    "order path range rate scale size start state step text title type user value weight width"
)
_MEANINGS = (
    "the first thing", "a new part", "the given item", "what to take", "where it goes", "the one to use",
    "an old entry", "its default", "what is read",
)  # fmt: skip
#: The definition's line, and what follows it.
_DEFINITIONS = (
    (
        "def {verb}(self, {first}, {second}, {third}):",
        '\n    """{verb} it.\n\n    :param {first}: {one}\n    :param {second}: {two}\n    :param',
    ),
    (
        "def {verb}(self, {fourth}, {first}, {second}, {third}):",
        '\n    """{verb} it.\n\n    @param {first}: {one}\n    @param {second}: {two}\n    @param',
    ),
)
_SUMS = (
    "23 + 14 = 37, 45 + 28 = 73, 31 + 46 = 77, {a} + {b} = ",
    "Add the numbers.\n23 + 14 = 37\n45 + 28 = 73\n31 + 46 = 77\n{a} + {b} = ",
)


@verb
def ioi_pairs(n: Count = 100, seed: Seed = 0) -> Relation:
    """Indirect object identification: who is given something.

    Parameters
    ----------
    n
        How many different prompts.

    Returns
    -------
    Relation
        Of whole prompts (`kcwb.tasks.pairs`); wrong is the giver's name, and the subject its second mention.

    Raises
    ------
    SettingError
        If there are not as many different prompts.
    """

    def row(draw: random.Random) -> dict[str, object]:
        taker, giver, other = draw.sample(_NAMES, 3)
        first, second = draw.sample([taker, giver], 2)
        text = draw.choice(_GIVING).format(
            first=first, second=second, place=draw.choice(_PLACES), thing=draw.choice(_THINGS), giver="{}"
        )
        return {
            "clean": text.format(giver),
            "corrupted": text.format(other),
            "answer": taker,
            "wrong": giver,
            "subject": _span(text, giver),
        }

    return _relation("ioi", n, seed, row)


@verb
def greater_than_pairs(n: Count = 100, seed: Seed = 0, *, whole: bool = False) -> Relation:
    """Years that are greater than another: several right answers and several wrong ones.

    Parameters
    ----------
    n
        How many different prompts.
    whole
        Answers are the year's last two digits, for tokenizers that read two digits as one token (GPT-2's, not always);
        else the first of the two, and the digit that the years have in common is neither right nor wrong.

    Returns, Raises
    ---------------
    As `ioi_pairs`; the subject is the first of the last two digits of the year that is given.
    """

    def row(draw: random.Random) -> dict[str, object]:
        century, year = draw.randrange(15, 20), draw.randrange(20, 90)
        words = draw.choice(_LASTING)
        text = words.format(event=draw.choice(_EVENTS), century=century, year="{}")
        numbers = [f"{k:02}" for k in range(100)] if whole else [str(k) for k in range(10)]
        at = year if whole else year // 10
        return {
            "clean": text.format(year),
            "corrupted": text.format(f"0{year % 10}"),
            "answer": numbers[at + 1 :],
            "wrong": numbers[:at],
            "subject": _span(text, str(year // 10)),
            "space": False,
        }

    return _relation("greater_than", n, seed, row)


@verb
def docstring_pairs(n: Count = 100, seed: Seed = 0) -> Relation:
    """Docstrings that describe a function's parameters in order: induction from the second to the third.

    Parameters, Returns, Raises
    ---------------------------
    As `ioi_pairs`; wrong are the two that were described, and the subject the second of them where it is described.
    """

    def row(draw: random.Random) -> dict[str, object]:
        names = draw.sample(_PARAMETERS, 8)
        keys = ("first", "second", "third", "fourth")
        head, rest = draw.choice(_DEFINITIONS)
        one, two = draw.sample(_MEANINGS, 2)
        said = {"verb": draw.choice(_VERBS), "one": one, "two": two}
        own, other = dict(zip(keys, names[:4], strict=True)), dict(zip(keys, names[4:], strict=True))
        before = head.format(**said, **own)
        text = before + rest.format(**said, **own | {"second": "{}"})
        return {
            "clean": text.format(own["second"]),
            "corrupted": head.format(**said, **other) + rest.format(**said, **own),
            "answer": own["third"],
            "wrong": [own["first"], own["second"]],
            "subject": _span(text, own["second"]),
        }

    return _relation("docstring", n, seed, row)


@verb
def addition_pairs(n: Count = 100, seed: Seed = 0, *, carry: bool | None = None) -> Relation:
    """Sums of two two-digit numbers, of two digits themselves.

    Parameters
    ----------
    n
        How many different prompts.
    carry
        Whether the ones carry over; None: some do.

    Returns, Raises
    ---------------
    As `ioi_pairs`; wrong are the other numbers of the same ten, and the subject is the two numbers.
    """

    def row(draw: random.Random) -> dict[str, object]:
        a, b = _summands(draw, carry, None)
        text, total = draw.choice(_SUMS), a + b
        tens = [f"{total // 10}{k}" for k in range(10)]
        c, d = _summands(draw, carry, total // 10)
        return {
            "clean": text.format(a=a, b=b),
            "corrupted": text.format(a=c, b=d),
            "answer": str(total),
            "wrong": [one for one in tens if one != str(total)],
            "subject": [text.index("{a}"), text.index("{a}") + len("00 + 00")],
        }

    return _relation("addition", n, seed, row)


def _summands(draw: random.Random, carry: bool | None, not_ten: int | None) -> tuple[int, int]:
    while True:
        a, b = draw.randrange(10, 90), draw.randrange(10, 90)
        if a + b <= 99 and (a + b) // 10 != not_ten and carry in (None, a % 10 + b % 10 > 9):
            return a, b


def _span(text: str, gap: str) -> list[int]:
    """Where what fills a text's gap stands in it."""
    return [text.index("{}"), text.index("{}") + len(gap)]


def _relation(name: str, n: int, seed: int, row: Callable[[random.Random], dict[str, object]]) -> Relation:
    """`n` different prompts as a relation."""
    draw = random.Random(f"{name} {seed}")
    rows: dict[object, dict[str, object]] = {}
    for _ in range(50 * n):
        one = row(draw)
        rows.setdefault(one["clean"], one)
        if len(rows) == n:
            return read_pairs(pd.DataFrame(list(rows.values())), name=name)
    raise SettingError(f"{name}: there are not many more than {len(rows)} different prompts; n={n} is too large.")
