"""The folder that a sweep keeps its cells in; see `kcwb.sweep.what`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.files import write_text
from kcwb.sweep.run import NUMBERS, Cell, Outcome

_FORMAT, _CELL_FORMAT = "kcwb-sweep/1", "kcwb-sweep-cell/1"
_RECORD = {"cell", "worker", "seconds", "model_digest", "numbers", "circuit_digest", "error"}


@contextmanager
def open_store(folder: Path) -> Iterator[Path]:
    """Make a store, or take one that is there, for this process alone to write to; the system frees it after a kill."""
    try:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"The store {folder} is a file. Give a folder.")
        new = not (folder / "sweep.json").exists()
        if new and folder.exists() and any(not one.name.startswith(".") for one in folder.iterdir()):
            raise DataError(
                f"{folder} holds files and is not the store of a sweep. Give an empty folder, or a new one."
            )
    except OSError as error:
        raise DataError(f"The store {folder} cannot be read: {error.strerror}.") from error
    if new:
        _write_text(folder / "sweep.json", json.dumps({"format": _FORMAT}) + "\n")
    check_store(folder)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise SettingError(
            f"Another sweep is writing to {folder}. Wait until it is done, or give this one another store."
        ) from None
    except OSError as error:
        raise DataError(f"The store {folder} cannot be written to: {error.strerror}.") from error
    with lock:
        yield folder


def _write_text(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. What was written before is whole.") from error


def check_store(folder: Path) -> None:
    """Raise DataError if a folder is no store, or another version's."""
    try:
        found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder} is not the store of a sweep: it has no sweep.json. Give an empty folder.") from error
    if found != _FORMAT:
        raise DataError(f"{folder} is a store of another version: its format is {found!r}, not {_FORMAT!r}.")


def finished(folder: Path, cell: Cell) -> bool:
    """Whether a cell is done and its circuit is there, whole."""
    if not (folder / "cells" / f"{cell.digest}.json").exists():
        return False
    record = _read_cell(folder, cell.digest)
    if record["status"] != "done":
        return False
    try:
        return Circuit.load(folder / "circuits" / f"{cell.digest}.json").digest == record["circuit_digest"]
    except CircuitError:
        return False  # it is computed again


def known_weights(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """Model and precision -> the digest of its weights in the store's finished cells, and where those were computed."""
    records = [_read_cell(folder, digest) for digest in stored_digests(folder)]
    return {
        (one["cell"]["model"], one["cell"]["dtype"]): (one["model_digest"], one["worker"])
        for one in records
        if one["model_digest"] is not None
    }


def stored_digests(folder: Path) -> list[str]:
    """The cells that a store has records of."""
    return sorted(path.stem for path in (folder / "cells").glob("*.json"))


def write_cell(folder: Path, cell: Cell, outcome: Outcome) -> None:
    """The circuit first, then the record that says that the cell is done."""
    if outcome.circuit is not None:
        outcome.circuit.save(folder / "circuits" / f"{cell.digest}.json", force=True)
    record = {
        "format": _CELL_FORMAT,
        "cell": cell.key,
        "status": "failed" if outcome.error else "done",
        "error": outcome.error,
        "numbers": None if outcome.numbers is None else dict(outcome.numbers),
        "circuit_digest": None if outcome.circuit is None else outcome.circuit.digest,
        "model_digest": outcome.model_digest,
        "seconds": None if outcome.seconds is None else round(outcome.seconds, 3),
        "worker": outcome.worker,
    }
    _write_text(folder / "cells" / f"{cell.digest}.json", json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def _read_cell(folder: Path, digest: str) -> dict[str, Any]:
    path = folder / "cells" / f"{digest}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _CELL_FORMAT or record["status"] not in ("done", "failed"):
            raise ValueError(f"format {record['format']!r}, status {record['status']!r}")
        missing = _RECORD - record.keys() or {one.name for one in fields(Cell)} - record["cell"].keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        numbers = {**(record["numbers"] or {}), "seconds": record["seconds"]}
        for name in ("tau", "edges"):
            numbers[name] = record["cell"][name]
        for name, value in numbers.items():
            if not (value is None or type(value) is float or (type(value) is int and abs(value) < sys.float_info.max)):
                raise ValueError(f"{name} is {value!r:.60}")
        if record["status"] == "done" and record["numbers"] is None:
            raise ValueError("it lacks numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Delete it, and the cell is computed again.") from error
    return record


def cell_table(folder: Path, digests: Iterable[str]) -> pd.DataFrame:
    """One row per cell."""
    rows = []
    for digest in digests:
        record = _read_cell(folder, digest)
        done = record["status"] == "done"
        row = {**record["cell"], **(record["numbers"] or {})} | {
            key: record[key] for key in ("status", "error", "seconds", "worker")
        }
        rows.append(row | {"circuit": str(folder / "circuits" / f"{digest}.json") if done else None})
    columns = [*(one.name for one in fields(Cell)), "status", "error", *NUMBERS, "seconds", "worker", "circuit"]
    numbers = dict.fromkeys(("tau", "edges", "seconds", *NUMBERS), float)
    return pd.DataFrame(rows, columns=columns).astype(numbers)
