"""Folders of models in the user's cache: whole, or not there.

1. A folder is built in a hidden sibling and renamed at its end, under a lock that the system frees when its holder
   dies: processes may race, and a kill leaves no half folder under the final name.
2. `kcwb.json`, written last, lists size and SHA-256 of each file; a folder whose sizes disagree with it is rebuilt, and
   one whose content does is taken away by `discard_damaged`, for whoever reads large files and can hash them meanwhile.
3. A folder that is replaced is renamed first: who is reading it keeps the files that are open.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from kcwb.files import user_folder

#: The file of a folder that says where it comes from, and which files it has.
MANIFEST = "kcwb.json"


def model_cache() -> Path:
    """Where folders of models are kept: in the user's cache, or under the environment variable `KCWB_CACHE`."""
    return user_folder("models")


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def is_whole(folder: Path, hashed: bool = False) -> bool:
    """Whether the folder's manifest can be read and every file it lists is there in its size.

    With `hashed`, it must list digests too, which earlier versions did not, unless the cache cannot be written.
    """
    try:
        manifest = read_manifest(folder)
        sizes = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return sizes and (not hashed or "sha256" in manifest or not os.access(folder.parent, os.W_OK))
    except _UNREADABLE:
        return False


def damaged_files(folder: Path) -> list[str]:
    """The files of a folder whose content is not what its manifest says; reads them all, half a second per GB or so."""
    try:
        digests = dict(read_manifest(folder).get("sha256", {}))
    except _UNREADABLE:
        return [MANIFEST]
    return [name for name, digest in digests.items() if file_digest(folder / name) != digest]


def file_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and SHA-256 of a folder's files, as a manifest has them."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sha256": {name: file_digest(path) for name, path in files.items()},
    }


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def discard_damaged(folder: Path) -> None:
    """Take a folder away whose content is not what its manifest says, unless another process has replaced it."""
    with _lock(folder, ""):
        if folder.exists() and damaged_files(folder):
            aside = _aside(folder)
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)


def put_folder(new: Path, target: Path) -> None:
    """Give a folder its final name; what was there before comes back if that fails."""
    aside = _aside(target)
    try:
        if target.exists():
            os.rename(target, aside)
        os.rename(new, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the folder says about itself."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def build_folder(
    folder: Path, build: Callable[[Path], dict[str, Any]], waiting: str = "", hashed: bool = False
) -> Path:
    """Return a folder of the cache, which is built first if it is not whole; OSError if the cache cannot be written.

    `build` writes the files into the folder that it is given, and returns what the manifest is to say beside their
    sizes; what it raises is passed on, and then nothing is left. `waiting` is said on stderr while another process
    builds the same folder, if it is not empty; `hashed` is as in `is_whole`.
    """
    if is_whole(folder, hashed):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder, waiting):
        if not is_whole(folder, hashed):
            _build(folder, build)
    return folder


def _lock(folder: Path, waiting: str) -> Any:
    """An acquired lock, to be used as a context."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            say(waiting)
        return lock.acquire()


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Build in a hidden sibling, then rename. The lock is held: what lies there is of a dead run."""
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, *folder.parent.glob(f".{folder.name}.*.old")):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        manifest = build(partial) | file_digests(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write a Hugging Face model and its tokenizer to a folder; return the digest of the weights."""
    from safetensors import SafetensorError

    from kcwb.models.digest import weights_digest

    try:
        with no_bars():  # of one piece
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors makes its files private; a folder may be shared, so they get the mode of their neighbours.
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)
    return weights_digest(model)


@contextmanager
def no_bars(hidden: bool = True) -> Iterator[None]:
    """Have Hugging Face show no progress bars for the time being."""
    from transformers.utils import logging

    shown = hidden and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def say(line: str) -> None:
    """Write a line to stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
