"""How long loops report, and how they are cancelled."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

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
        with _bar(total, what) as bar:

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


def _bar(total: int, what: str) -> tqdm:
    """A bar on stderr; in a notebook a line of text, for tqdm's widget would be left dead in the saved file."""
    from tqdm import tqdm

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):
        return tqdm(total=total, desc=what, leave=False)
    from IPython.display import display

    class Line(tqdm):
        shown: Any = None

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            words = str(self) if msg is None else msg
            bundle = {"text/plain": words} if words else {}
            if self.shown is None:
                self.shown = display(bundle, raw=True, display_id=True)
            else:
                self.shown.update(bundle, raw=True)

    return Line(total=total, desc=what, leave=False, file=io.StringIO(), miniters=1)
