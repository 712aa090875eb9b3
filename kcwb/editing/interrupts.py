"""Ctrl-C waits until an edit is out of the weights, and comes then.

Python handles a signal between any two steps of the main thread, and Ctrl-C's handler raises: on a function's first
step, too, where no `try` of its own holds yet. So as long as an edit is in, Ctrl-C comes here first, sees what is
running, and waits while an edit is being taken out. Other threads get no signals.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])

#: The methods that Ctrl-C waits for -> whether it does, given the object.
_WHOLE: dict[CodeType, Callable[[Any], bool]] = {}
_waiting: list[tuple[int, FrameType | None]] = []
_before: Callable[[int, FrameType | None], Any] = signal.default_int_handler


def whole(while_: Callable[[Any], bool]) -> Callable[[Method], Method]:
    """Mark a method that Ctrl-C has to wait for as long as `while_(self)` holds; `settle` must end it."""

    def mark(method: Method) -> Method:
        _WHOLE[method.__code__] = while_  # pyright: ignore[reportFunctionMemberAccess]
        return method

    return mark


def guard() -> None:
    """From now on Ctrl-C waits for the methods marked `whole`."""
    global _before
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGINT)
    if handler is not _handle and callable(handler):
        _before = handler
        signal.signal(signal.SIGINT, _handle)


def settle(last: bool) -> None:
    """Let come what has waited; with `last` there is nothing more to guard."""
    if threading.current_thread() is not threading.main_thread():
        return
    if last and signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, _before)
    if _waiting:
        number, frame = _waiting[-1]
        _waiting.clear()
        _before(number, frame)


def _handle(number: int, frame: FrameType | None) -> None:
    at = frame
    while at is not None:
        if at.f_code in _WHOLE and _WHOLE[at.f_code](at.f_locals["self"]):
            _waiting.append((number, frame))
            return
        at = at.f_back
    _before(number, frame)
