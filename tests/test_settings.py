"""What a setting may be: numbers are numbers, text is text, and a long list takes no time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.settings import Count, Limit, Natural, NotNegative, Positive, Score, Seed, Share, fits, plain, shown, words

OBJECT = object()
HUGE = 10**40
ALL = [
    True, None, 0, 1, -1, HUGE, 0.5, 1.0, -2.5, math.nan, math.inf, "x", "Ä", "", "\0", "\ud800", b"x", Path("x"),
    Path("\0"), [], [1], ["x"], (1, "x"), {"x": 1}, {1: "x"}, OBJECT, len, torch.zeros(2, 2),
]  # fmt: skip
#: Annotation -> those of ALL that it takes, and the words for it.
TAKES: list[tuple[Any, list[Any], str]] = [
    (bool, [True], "True or False"),
    (int, [0, 1, -1, HUGE], "a whole number"),
    (float, [0, 1, -1, HUGE, 0.5, 1.0, -2.5], "a number"),
    (str, ["x", "Ä", ""], "text"),
    (Path, [Path("x")], "a path"),
    (str | Path, ["x", "Ä", "", Path("x")], "text or a path"),
    (Count, [1, HUGE], "a whole number of at least 1"),
    (Natural, [0, 1, HUGE], "a whole number of at least 0"),
    (Seed, [0, 1], "a whole number from 0 to 2**63 - 1"),
    (Positive, [1, HUGE, 0.5, 1.0], "a number above 0"),
    (NotNegative, [0, 1, HUGE, 0.5, 1.0], "a number of at least 0"),
    (Share, [1, 0.5, 1.0], "a number above 0 and at most 1"),
    (Score, [0, 1, -1, HUGE, 0.5, 1.0, -2.5, math.nan, math.inf], "a number or NaN"),
    (Limit, [1, HUGE, 0.5, 1.0, math.inf], "a number above 0, or math.inf"),
    (Count | None, [None, 1, HUGE], "a whole number of at least 1 or None"),
    (int | str | None, [None, 0, 1, -1, HUGE, "x", "Ä", ""], "a whole number, text or None"),
    (Literal["x", 1], [1, "x"], "'x' or 1"),
    (Sequence[int], [[], [1]], "a list of: a whole number"),
    (Sequence[str], [[], ["x"]], "a list of: text"),
    (tuple[int, str], [(1, "x")], "a tuple of a whole number, text"),
    (Mapping[str, int], [{"x": 1}], "a mapping from text to a whole number"),
    (Callable[[int], None], [len], "a function"),
    (Tensor, [ALL[-1]], "a Tensor"),
    (Float[Tensor, "S R"] | None, [None, ALL[-1]], "a Tensor or None"),
    (Any, ALL, "anything"),
]


@pytest.mark.parametrize(("hint", "taken", "said"), TAKES, ids=[said for *_, said in TAKES])
def test_each_kind_takes_its_own_and_says_what_that_is(hint, taken, said):
    found = [one for one in ALL if fits(one, hint)]
    assert list(map(repr, found)) == list(map(repr, taken))
    assert words(hint) == said


@pytest.mark.parametrize("bad", [[1, True], [1] * 500 + ["x"], [[1]], "12", {1, "x"}])
def test_every_item_of_a_list_is_looked_at(bad):
    assert not fits(bad, Sequence[int])


class Counted(list[int]):
    """A list that counts how many of its items were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[int]:
        for item in super().__iter__():
            self.looked_at += 1
            yield item


def test_of_a_list_of_a_million_the_start_alone_is_looked_at():
    many = Counted([0] * 10**6)
    assert fits(many, Sequence[int]) and many.looked_at <= 1001
    assert not fits(["x"] * 10**6, Sequence[int])
    assert len(shown([0] * 10**6)) < 60


def test_an_iterator_is_not_used_up():
    from collections.abc import Iterable

    numbers = iter([1, 2])
    assert fits(numbers, Iterable[int]) and list(numbers) == [1, 2]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (np.int64(3), 3),
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([1, 2]), [1, 2]),
        (pd.Series(["a", "b"]), ["a", "b"]),
        (torch.tensor(3), 3),
    ],
)
def test_numbers_and_lists_of_numpy_pandas_and_torch_become_pythons_own(given, meant):
    found = plain(given)
    assert found == meant and type(found) is type(meant)


def test_matrices_stay_as_they_are():
    for matrix in (np.zeros((2, 2)), torch.zeros(2, 2), pd.DataFrame({"a": [1]})):
        assert plain(matrix) is matrix


@pytest.mark.parametrize(
    "value",
    [*ALL, 10**5000, "x" * 10**6, np.zeros(9), pd.DataFrame({"a": [1]})],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_on_a_part_of_a_line_that_can_be_written(value):
    text = shown(value)
    assert 0 < len(text) < 80 and "\n" not in text and "\0" not in text
    text.encode()
