"""One worker thread behind a panel: the latest request wins, and nothing that goes wrong is lost.

A job is a function `job(progress) -> result`. It calls `progress(done, total, note)` between batches; there, and in
every layer of a pass through a network, a cancelled or superseded job stops. Threads wait on a condition, never in a
loop; the worker lives while there is work, and so long it keeps what the first request had to wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from kcwb.progress import ProgressCallback, cancellable

State = Literal["idle", "running", "failed", "done"]
Job = Callable[[ProgressCallback], Any]
Hold = Callable[[ProgressCallback], AbstractContextManager[None]]
T = TypeVar("T")


class Latest(Generic[T]):
    """The value that a job made last, kept for the next one that needs it."""

    def __init__(self) -> None:
        self.value: T | None = None
        self._key: object = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value, made anew if it was made of something else."""
        if self.value is None or self._key != key:
            self.value, self._key = make(), key
        return self.value


class _Cancelled(BaseException):
    """Leaves a job whose result nobody waits for; not an Exception, so that no handler on the way mistakes it."""


@dataclass
class _Request:
    name: str
    job: Job
    on_done: Callable[[Any], None] | None
    on_progress: ProgressCallback | None
    follows: bool = False  # submitted by what the worker did before it
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.cancelled.is_set():
            raise _Cancelled

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.check()
        if self.on_progress is not None:
            self.on_progress(done, total, note)


class Runner:
    """Run jobs one at a time on one worker thread.

    Callbacks are called on the worker thread, one at a time. An exception in a job or in `on_done` fails the request;
    one in `on_change`, which is called after every change of `state` or `job`, or in `on_error` only becomes `error`.

    `hold` gives, for a progress callback, what is entered before the first request's job, and left when no work is
    left: a chain of requests has it without a gap. A request may be cancelled while it waits for it.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[], None] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
        hold: Hold | None = None,
    ) -> None:
        self._on_change, self._on_error, self._hold = on_change, on_error, hold
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._current: _Request | None = None
        self._next: _Request | None = None
        self._state: State = "idle"
        self._error: BaseException | None = None
        self._held = False  # read and written by the worker alone

    @property
    def state(self) -> State:
        """`running` while there is work, then `done` or `failed`; `idle` before, and after a cancel."""
        with self._changed:
            return "running" if self._current or self._next else self._state

    @property
    def job(self) -> str | None:
        """The name of the latest request that is not finished."""
        with self._changed:
            request = self._next or self._current
            return request.name if request else None

    @property
    def error(self) -> BaseException | None:
        """What the latest request, or one that it follows, failed with, or what a callback raised."""
        with self._changed:
            return self._error

    def submit(
        self,
        name: str,
        job: Job,
        on_done: Callable[[Any], None] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Run a job as soon as the current one has stopped; a request that was still waiting is dropped.

        `on_done` gets the job's result, unless it was cancelled or superseded meanwhile; `on_progress` its reports.
        What callbacks submit follows what was before it: if that failed, the state stays `failed`.
        """
        with self._changed:
            if self._current:
                self._current.cancelled.set()
            follows = threading.current_thread() is self._thread
            self._next = _Request(name, job, on_done, on_progress, follows)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="kcwb-runner", daemon=True)
                self._thread.start()

    def cancel(self) -> None:
        """Drop the waiting request and stop the current one, at its next report or layer."""
        with self._changed:
            if self._next:
                self._next, self._state = None, "idle"
            if self._current:
                self._current.cancelled.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until there is no work; False if that took longer than `timeout` seconds.

        Called on the worker thread itself it returns at once. Interrupting it (Ctrl-C, Kernel > Interrupt) cancels.
        """
        if threading.current_thread() is self._thread:
            return False
        try:
            with self._changed:
                return self._changed.wait_for(lambda: self._thread is None, timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def close(self) -> None:
        """Cancel, and wait for the end of the thread; called on that thread itself, only cancel."""
        thread = self._thread
        self.cancel()
        if self.wait() and thread is not None:
            thread.join()

    def _work(self) -> None:
        """Take requests until none is left."""
        while True:
            with ExitStack() as held:
                while self._take(held):
                    pass
            with self._changed:  # a request may have come while it was let go
                if self._next is None:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def _take(self, held: ExitStack) -> bool:
        """Run the next request; False if there is none."""
        with self._changed:
            request = self._current = self._next
            self._next = None
            failed = request is not None and request.follows and self._state == "failed"
            if request is not None and not failed:
                self._error = None
        if request is not None:
            self._call(self._on_change)
            state, error = _run(request, self._enter, held)
            with self._changed:
                self._current, self._error = None, error or self._error
                self._state = "failed" if failed and state == "done" else state
            if error is not None:
                self._call(self._on_error, error)
        self._call(self._on_change)
        with self._changed:
            return self._next is not None

    def _enter(self, request: _Request, held: ExitStack) -> None:
        """Enter what is held, unless an earlier request of this chain has."""
        if self._hold is not None and not self._held:
            held.enter_context(self._hold(request.progress))
            self._held = True
            held.callback(setattr, self, "_held", False)

    def _call(self, callback: Callable[..., None] | None, *values: Any) -> None:
        """Call back; what it raises must not end the worker."""
        try:
            if callback is not None:
                callback(*values)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error


def _run(
    request: _Request, enter: Callable[[_Request, ExitStack], None], held: ExitStack
) -> tuple[State, BaseException | None]:
    """Run one request: the state that it leaves, and what it failed with."""
    try:
        with cancellable(request.check):
            enter(request, held)
            result = request.job(request.progress)
        if request.cancelled.is_set():
            return "idle", None
        if request.on_done is not None:
            request.on_done(result)
    except _Cancelled:
        return "idle", None
    except BaseException as error:
        return ("idle", None) if request.cancelled.is_set() else ("failed", error)
    return "done", None
