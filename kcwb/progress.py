"""How long loops report, and how they are cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: Called as `progress(done, total, note)` between batches. An exception that it raises stops the loop: so to cancel.
ProgressCallback = Callable[[int, int, str], None]
#: True draws a bar (tqdm, in a notebook or on stderr), False is silent.
Progress = bool | ProgressCallback

_CHECK: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextmanager
def cancellable(check: Callable[[], None]) -> Iterator[None]:
    """Have `check` called often meanwhile, in this thread; an exception that it raises stops the work, so to cancel.

    Between reports of progress a large model may compute for many seconds.
    """
    token = _CHECK.set(check)
    try:
        yield
    finally:
        _CHECK.reset(token)


def cancel_point() -> None:
    """Call the check that is in force, if there is one."""
    check = _CHECK.get()
    if check is not None:
        check()


@contextmanager
def track(progress: Progress, total: int, what: str) -> Iterator[Callable[..., None]]:
    """Yield `step(n=1, note="")`, to be called after every n of `total` pieces of work."""
    if progress is True:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=what, leave=False) as bar:

            def draw(n: int = 1, note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update(n)

            yield draw
        return

    done = 0

    def call(n: int = 1, note: str = "") -> None:
        nonlocal done
        done += n
        if callable(progress):
            progress(done, total, note)

    yield call
