"""The warnings of a panel's jobs, which become its notes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.Lock()
_TAKEN: dict[int, list[str]] = {}  # by thread
_BEFORE: list[warnings.catch_warnings] = []  # what the first thread replaced


@contextmanager
def notes() -> Iterator[list[str]]:
    """The texts of the UserWarnings that this thread gives meanwhile; other threads' go where they always went.

    Python keeps its filters and `showwarning` for the whole process, so that two threads in `warnings.catch_warnings`
    undo each other's. Here the first thread to come replaces them and the last one to leave puts them back.
    """
    thread, texts = threading.get_ident(), []
    with _LOCK:
        if not _TAKEN:
            _replace()
        _TAKEN[thread] = texts
    try:
        yield texts
    finally:
        with _LOCK:
            del _TAKEN[thread]
            if not _TAKEN:
                _BEFORE.pop().__exit__(None, None, None)


def _replace() -> None:
    _BEFORE.append(warnings.catch_warnings())
    _BEFORE[-1].__enter__()
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
        texts = _TAKEN.get(threading.get_ident())
        if texts is None:
            usual(message, category, *more, **named)
        elif issubclass(category, UserWarning):
            texts.append(str(message))

    warnings.showwarning = show
    warnings.simplefilter("always", UserWarning)
