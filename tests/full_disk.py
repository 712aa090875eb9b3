"""A disk that takes no more, by the limit on the size of files that the system keeps for a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def full_disk(left: int = 0) -> Iterator[None]:
    """Let no file grow beyond `left` bytes meanwhile: a write raises OSError (EFBIG), as on a full disk (ENOSPC)."""
    resource = pytest.importorskip("resource", reason="needs a POSIX system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
