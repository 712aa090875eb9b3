"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def user_folder(name: str) -> Path:
    """A folder of the user's cache, or under the environment variable `KCWB_CACHE`."""
    from platformdirs import user_cache_path

    root = os.environ.get("KCWB_CACHE")
    return (Path(root).expanduser().absolute() if root else user_cache_path("kcwb")) / name


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`: on success it becomes `path`, after an exception `path` is as it was.

    Where `path` is a symbolic link it stays one, and what it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file: a crash leaves the old file, never half of the new one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in the same way, with the permissions of any other file; OSError if the disk is full.

    safetensors' own `save_file` makes files that their owner alone can read, and raises errors of its own.
    """
    from safetensors.torch import save

    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder meanwhile, where the system can; a kill lets go of it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be listed, or a file system without locks
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
