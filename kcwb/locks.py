"""One lock per model: whatever reads or writes its weights has them to itself for as long as it takes.

    with model.exclusive():
        ...  # no other thread edits the model, or runs it

Every public verb holds the lock of its models (`kcwb.verbs`), so a circuit, its digest and its provenance come from
one state of the weights. The lock is one for all objects that share the weights (one Hugging Face module may be loaded
several times), and the thread that holds it may take it again. Who has to wait says so, and can be cancelled.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kcwb.progress import Progress, cancel_point, track

if TYPE_CHECKING:
    from torch import Tensor

WAITING = "waiting for another run on this model"
_POLL = 0.1  # seconds between two looks whether the wait was cancelled
_NUMBERS = itertools.count()
_GUARD = threading.Lock()
_LOCKS: weakref.WeakValueDictionary[int, WeightsLock] = weakref.WeakValueDictionary()


class WeightsLock:
    """A re-entrant lock, for which one waits visibly."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        #: Several locks are taken in this order, so that no two threads wait for each other.
        self.number = next(_NUMBERS)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model has a lock of its own."""
        return WeightsLock, ()

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._lock._is_owned()

    @property
    def elsewhere(self) -> bool:
        """Whether another thread has it."""
        free = self._lock.acquire(blocking=False)
        if free:
            self._lock.release()
        return not free

    def acquire(self, progress: Progress = True) -> None:
        """Take the lock; a wait is reported to `progress`, and ends with what a cancel raises."""
        if self._lock.acquire(timeout=_POLL):
            return
        with track(progress, 1, WAITING) as step:
            while not self._lock.acquire(timeout=_POLL):
                cancel_point()
                step(0, WAITING)

    def release(self) -> None:
        """Give it back, in the thread that took it."""
        self._lock.release()


def lock_of(weight: Tensor) -> WeightsLock:
    """The lock of the model that has this weight: the same for all who ask, as long as one of them keeps it."""
    with _GUARD:
        return _LOCKS.setdefault(weight.data_ptr(), WeightsLock())


class Exclusive:
    """Holds, in `with`, those of some locks that this thread does not have yet.

    A plain class: Ctrl-C finds fewer steps at which a lock would stay taken than in a generator.
    """

    def __init__(self, locks: Iterable[WeightsLock] = (), progress: Progress = True) -> None:
        self._taken = sorted({lock for lock in locks if not lock.mine}, key=lambda lock: lock.number)
        self._progress = progress

    @property
    def holds(self) -> bool:
        """Whether it has taken a lock, and not given it back."""
        return any(lock.mine for lock in self._taken)

    def __enter__(self) -> None:
        try:
            for lock in self._taken:
                lock.acquire(self._progress)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        while self._taken:
            if self._taken[-1].mine:  # not so where it was still waited for
                self._taken[-1].release()
            self._taken.pop()
