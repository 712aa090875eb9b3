"""Folders of models in the user's cache: whole, or not there.

1. A folder is built in a hidden sibling and renamed at its end, under a lock that the system frees when its holder
   dies: processes may race, and a kill leaves no half folder under the final name.
2. `kcwb.json`, written last, lists the size of each file; a folder that disagrees with it is rebuilt.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from tqdm import tqdm

#: The file of a folder that says where it comes from, and which files it has.
MANIFEST = "kcwb.json"


def model_cache() -> Path:
    """Where folders of models are kept: in the user's cache, or under the environment variable `KCWB_CACHE`."""
    override = os.environ.get("KCWB_CACHE")
    return (Path(override).expanduser().absolute() if override else user_cache_path("kcwb")) / "models"


def is_whole(folder: Path) -> bool:
    """Whether the folder's manifest can be read and every file it lists is there in its size."""
    try:
        return all((folder / name).stat().st_size == size for name, size in read_manifest(folder)["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the folder says about itself."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def build_folder(folder: Path, build: Callable[[Path], dict[str, Any]], waiting: str = "") -> Path:
    """Return a folder of the cache, which is built first if it is not whole.

    Parameters
    ----------
    folder
        Its final name.
    build
        Writes the files into the folder that it is given, and returns what the manifest is to say beside their sizes.
        What it raises is passed on; then nothing is left.
    waiting
        What to say on stderr while another process builds the same folder; nothing if empty.

    Raises
    ------
    OSError
        If the cache cannot be written.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock"), waiting):
        if not is_whole(folder):
            _build(folder, build)
    return folder


def _lock(path: Path, waiting: str) -> Any:
    """An acquired lock, to be used as a context."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            say(waiting)
        return lock.acquire()


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Build in a hidden sibling, then rename. The lock is held: what lies there is of a dead run."""
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        manifest = build(partial)
        manifest["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write a Hugging Face model and its tokenizer to a folder; return the digest of the weights."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    from kcwb.models.digest import weights_digest

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of one piece
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    # safetensors makes its file private; a cache may be shared, so it gets the mode of its neighbours.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return weights_digest(model)


def say(line: str) -> None:
    """Write a line to stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
