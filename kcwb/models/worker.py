"""What a worker process does beside its work: it keeps a model, has a GPU of its own, and ends with who started it.

And, for the process that started it: `results`, what an executor's workers make of some calls, as they are done.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import itertools
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kcwb.errors import KcwbError
from kcwb.models.loading import Model, load_model


class Latest:
    """What a process made last, which the next call often asks for again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, unless it is at hand under its key; the one before is freed first."""
        with self._lock:
            if key not in self._made:
                self.forget()
                self._made[key] = make()
            return self._made[key]

    def forget(self) -> None:
        """Free it."""
        self._made.clear()


class _Worker(Latest):
    def model(self, name: str, device: str, dtype: str) -> Model:
        """A model, loaded unless it is the one at hand."""
        return self.get((name, device, dtype), lambda: load_model(name, device=device, dtype=dtype))


#: This process as a worker.
WORKER = _Worker()


def results(
    executor: Executor, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], kept: str
) -> Iterator[tuple[int, Future[Any]]]:
    """The number of each call with its future, as they are done; what is not done when this is left is cancelled.

    KcwbError, when all others are through, if workers died or their cluster went away; `kept` says where what was done
    is.
    """
    futures: dict[Future[Any], int] = {}
    broken: BaseException | None = None
    try:
        for number, call in enumerate(calls):
            futures[executor.submit(function, *call)] = number
        for future in as_completed(futures):
            error = CancelledError("cancelled") if future.cancelled() else future.exception()
            if isinstance(error, (BrokenExecutor, CancelledError)):
                broken = error  # others may be done, and are kept
            else:
                yield futures[future], future
    except BrokenExecutor as error:
        broken = error
    finally:
        for future in futures:
            future.cancel()
    if broken is not None:
        raise KcwbError(
            f"The executor's workers died, or its cluster went away ({type(broken).__name__}: {broken!s:.200}). {kept}"
        ) from broken


@functools.cache
def leave_with_parent() -> None:
    """In a worker process: end soon after the process that started it, even if that was killed.

    A pool's workers wait for work at a pipe that they themselves hold open, so that they would wait forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent, os.getppid()), daemon=True, name="kcwb-parent").start()


def _watch(parent: Any, number: int) -> None:
    while parent.is_alive() and os.getppid() == number:  # its end of a pipe closes; but forked siblings may hold that
        parent.join(1.0)
    os._exit(1)


def error_words(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


_SLOTS: list[FileLock] = []


def pinned_device(device: str) -> str:
    """The device of this worker process: with `"auto"` and several GPUs, one of its own, in turn.

    The first process of a user on a machine takes number 0, the next 1, and so on; a number is free again when its
    process ends, however it does.
    """
    import torch

    if device != "auto" or not torch.cuda.is_available():
        return device
    return f"cuda:{_slot() % torch.cuda.device_count()}"


def _slot() -> int:
    """The number of this process among those of the machine that compute cells."""
    if not _SLOTS:
        folder = Path(tempfile.gettempdir()) / f"kcwb-workers-{getpass.getuser()}"
        folder.mkdir(exist_ok=True)
        for number in itertools.count():
            lock = FileLock(folder / f"{number}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                _SLOTS.append(lock)  # held as long as the process lives
                break
    return int(Path(_SLOTS[0].lock_file).stem)
