"""What a setting may be: the kinds that annotations name, and the check of a value against an annotation.

A kind is written once, here, and used as an annotation: `def discover(..., edges: Count | None = None)`. To a type
checker `Count` is an int; to `kcwb.verbs.verb` it is a whole number of at least 1.

Numbers are taken exactly: True is no number, 2.0 is no whole number, NaN and infinities are refused where a kind does
not name them; a whole number is a number. Text is what can be written to a file: no NUL, no lone surrogates. Containers
are looked into, a long one's start only; tensors, tables and objects are known by their class.
"""

from __future__ import annotations

import collections.abc
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Union

_LOOKED_AT = 1000  # items of a long list, so that a million take no time


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words, and the test of it."""

    words: str
    test: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _text(value: Any) -> bool:
    """Whether it is text that a file, a terminal and a tokenizer can take."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_PLAIN = {
    bool: Kind("True or False", lambda value: type(value) is bool),
    int: Kind("a whole number", _whole),
    float: Kind("a number", _number),
    str: Kind("text", _text),
    Path: Kind("a path", lambda value: isinstance(value, Path) and _text(str(value))),
    type(None): Kind("None", lambda value: value is None),
    Any: Kind("anything", lambda value: True),
}


def at_least(least: int) -> Kind:
    """A whole number that is not below some other: `draws: Annotated[int, at_least(20)]`."""
    return Kind(f"a whole number of at least {least}", lambda value: _whole(value) and value >= least)


#: How many: 1 or more.
Count = Annotated[int, at_least(1)]
#: How many, or which: 0 or more.
Natural = Annotated[int, at_least(0)]
#: What random draws start from; the range that torch, numpy and random all take.
Seed = Annotated[int, Kind("a whole number from 0 to 2**63 - 1", lambda value: _whole(value) and 0 <= value < 2**63)]
#: A number above 0.
Positive = Annotated[float, Kind("a number above 0", lambda value: _number(value) and value > 0)]
#: A number that is 0 or above.
NotNegative = Annotated[float, Kind("a number of at least 0", lambda value: _number(value) and value >= 0)]
#: A number, NaN where there is none.
Score = Annotated[float, Kind("a number or NaN", lambda value: type(value) in (int, float))]
#: A share of a whole, not none of it.
Share = Annotated[float, Kind("a number above 0 and at most 1", lambda value: _number(value) and 0 < value <= 1)]
#: What must not be reached, perhaps never.
Limit = Annotated[float, Kind("a number above 0, or math.inf", lambda value: type(value) in (int, float) and value > 0)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says."""
    hint = getattr(hint, "array_type", hint)  # of jaxtyping: what is done with tensors says how they have to be
    kind, origin, args = _kind(hint), typing.get_origin(hint), typing.get_args(hint)
    if kind is not None:
        return kind.test(value)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if not isinstance(value, origin or hint):
        return False
    if not args or not isinstance(value, Collection) or origin is collections.abc.Callable:
        return True
    if isinstance(value, (str, bytes)):  # a text is no list of its letters
        return False
    if isinstance(value, Mapping):
        return all(fits(key, args[0]) and fits(one, args[1]) for key, one in islice(value.items(), _LOOKED_AT))
    if origin is tuple and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(fits, value, args))
    return all(fits(one, args[0]) for one in islice(value, _LOOKED_AT))


def plain(value: Any) -> Any:
    """A number or a list of NumPy, pandas or torch as Python's own; all else as it is."""
    if getattr(value, "ndim", 2) < 2 and callable(getattr(value, "tolist", None)):
        return value.tolist()
    return value


def words(hint: Any) -> str:
    """What an annotation asks for."""
    hint = getattr(hint, "array_type", hint)
    kind, origin, args = _kind(hint), typing.get_origin(hint), typing.get_args(hint)
    if kind is not None:
        return kind.words
    if origin in (Union, types.UnionType):
        said = list(dict.fromkeys(words(one) for one in args))
        return " or ".join(said) if len(said) < 3 else f"{', '.join(said[:-1])} or {said[-1]}"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is collections.abc.Callable:
        return "a function"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a tuple of {', '.join(map(words, args))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping from {words(args[0])} to {words(args[1])}"
    if origin is not None:
        return f"a list of: {words(args[0])}"
    name = hint.__name__
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def shown(value: Any) -> str:
    """A value, shortened to part of a line."""
    if isinstance(value, (str, bytes, int, float, list, tuple, dict, set, Path, type(None))):
        try:
            return reprlib.repr(str(value) if isinstance(value, Path) else value)
        except ValueError:  # Python writes no number of more than 4,300 digits
            return "a number of thousands of digits"
    return f"<{type(value).__name__}>"


def _kind(hint: Any) -> Kind | None:
    if typing.get_origin(hint) is Annotated:
        return next((one for one in hint.__metadata__ if isinstance(one, Kind)), None)
    return _PLAIN.get(hint)
