"""The one family of exceptions: each says what is wrong, where, and what to do about it. And warnings."""

from __future__ import annotations

import difflib
import sys
import traceback
import warnings
from collections.abc import Iterable


class KcwbError(Exception):
    """Anything that kcwb refuses to do; its message is meant to be read by a person."""


class ModelError(KcwbError):
    """A model cannot be found, is of an architecture that is not covered, or fails its self-check."""


class DataError(KcwbError):
    """A relation or a fact is malformed, unknown, or not known by the model."""


class CircuitError(KcwbError):
    """A circuit or its file is malformed, damaged, or belongs to another model."""


class SettingError(KcwbError, ValueError):
    """A parameter has a value that cannot be meant."""


class KcwbWarning(UserWarning):
    """Something was left out, or could not be kept, and the work goes on."""


def warn(message: str, category: type[Warning] = KcwbWarning) -> None:
    """Warn at the line that called this package, from however deep within it: of one thing once for each such line."""
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
    ours = [i for i, frame in enumerate(frames) if frame.f_globals.get("__name__", "").split(".")[0] == "kcwb"]
    warnings.warn(message, category, stacklevel=max(ours, default=-1) + 3)


def nearest(name: str, known: Iterable[str], few: int | None = None) -> str:
    """Words that list the known names nearest to a misspelt one, to end an error message with.

    If none is near, all are listed; of more than `few`, so many.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(known[:few])}{'.' if len(known[:few]) == len(known) else ', ...'}"


def shown(value: object) -> str:
    """A value that somebody gave, for a message: at most 60 characters."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"


def choose(what: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is one of `known`, or raise SettingError that names the nearest ones."""
    known = list(known)
    if value not in known:
        raise SettingError(f"{what} {shown(value)} is not known. {nearest(str(value), known)}")
    return value
