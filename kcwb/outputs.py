"""Where results may be written: asked before anything runs, so that neither another's file nor the work is lost.

A file that is there is overwritten only if it is one that kcwb wrote, which a mark in it says, or if that is forced.
A file that is read, under whatever name, is never overwritten.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from kcwb.errors import SettingError, warn

PAGE_MARK = '<meta name="generator" content="kcwb">'
"""In the head of every page that we write."""

PDF_MARK = b"\n% printed by kcwb\n"
"""At the end of every PDF that we write, where a PDF may hold comments."""


class Kind(NamedTuple):
    """A kind of file: what it is called, and whether a file is one that kcwb wrote."""

    name: str
    ours: Callable[[Path], bool]

    @property
    def noun(self) -> str:
        """The name without its article."""
        return self.name.partition(" ")[2]


def check_output(
    path: str | Path,
    kind: Kind,
    *,
    what: str = "The output",
    inputs: Iterable[str | Path] = (),
    force: bool = False,
    make_folder: bool = False,
) -> None:
    """Raise SettingError, which calls the path `what`, unless a file of ours may and can be written there.

    Where the path is a symbolic link, that is what it leads to. Overwritten is only a file of the `kind` that is going
    to be written, if kcwb wrote it or with `force`, and none of the `inputs`, under no name. `make_folder`: a folder
    that is missing is going to be made.
    """
    try:
        target = Path(os.path.realpath(path))
        said = _refusal(target, kind, inputs, force) or _hindrance(target, make_folder)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        said = f"cannot be written: {getattr(error, 'strerror', None) or error}."
    if said:
        raise SettingError(f"{what} {str(path)!r} {said}")


def settle(path: Path, kind: Kind, *, force: bool = False) -> Path:
    """The same path, or a new one beside it if a file of another's has appeared there since it was checked."""
    if force or not _refusal(Path(os.path.realpath(path)), kind, (), force):
        return path
    free = next(one for i in range(2, 10_000) if not os.path.lexists(one := path.with_stem(f"{path.stem} ({i})")))
    warn(f"Meanwhile something else wrote {path}, which is kept: this is in {free}.")
    return free


def _refusal(target: Path, kind: Kind, inputs: Iterable[str | Path], force: bool) -> str:
    """Why a path must not be written to; empty if it may."""
    for source in inputs:
        there = target.exists() and os.path.exists(source)
        if os.path.realpath(source) == str(target) or (there and os.path.samefile(target, source)):
            return (
                f"is {Path(source).name}, which is read: only {kind.name} is overwritten, and nothing that is read. "
                "Choose another name."
            )
    if target.is_dir():
        return "is a folder. Give the name of a file."
    if os.path.lexists(target) and not target.is_file():
        return "is no file that could be replaced. Choose another name."
    if not force and target.exists() and not kind.ours(target):
        return (
            f"is kept: only {kind.name} is overwritten, if kcwb wrote it. Choose another name, or force it (--force; "
            "in Python, force=True)."
        )
    return ""


def _hindrance(target: Path, make_folder: bool) -> str:
    """Why a path cannot be written to; empty if it can, which is tried."""
    if target.exists() and not os.access(target, os.W_OK):
        return "is write-protected. Choose another name."
    folder = target.parent
    while make_folder and not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        return f"cannot be written: {folder} is not a folder. Make it first."
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"cannot be written: the folder {folder} is write-protected."
    draft = folder / f".{target.name}.{uuid.uuid4().hex}.tmp"  # as `atomic_path` makes one
    draft.touch()
    draft.unlink()
    return ""


def _marked(pattern: bytes, most: int) -> Callable[[Path], bool]:
    """Whether a pattern is in the first bytes of a file."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            return re.search(pattern, file.read(most)) is not None

    return ours


def _is_pdf(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, len(PDF_MARK)), os.SEEK_END)
        return file.read() == PDF_MARK


def _is_graph(path: Path) -> bool:
    from kcwb.workbench.graph.figure import MARK

    return MARK.encode() in path.read_bytes()


PAGE, PDF = Kind("a page", _marked(re.escape(PAGE_MARK.encode()), 2000)), Kind("a PDF", _is_pdf)
# Of any version, also one that was cut off or written anew by another tool.
CIRCUIT = Kind("a circuit", _marked(rb'"format"\s*:\s*"kcwb-circuit/', 2**20))
ENSEMBLE = Kind("an ensemble", _marked(rb'"format"\s*:\s*"kcwb-ensemble/', 2**20))
GRAPH = Kind("a picture of a circuit", _is_graph)


def same_text(text: str) -> Kind:
    """A file that may be written again because it already holds this very text."""
    return Kind("the same text", lambda path: path.read_bytes() == text.encode("utf-8"))
