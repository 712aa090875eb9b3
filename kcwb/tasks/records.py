"""Files of records as people have them: what is wrong with one is said in one line, and the rest is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from kcwb.errors import DataError, warn

Place = TypeVar("Place")
Read = TypeVar("Read")


def readable(places: Iterable[Place], read: Callable[[Place], Read], what: str) -> list[Read]:
    """What can be read of some places; warns of the others, or raises DataError if there is nothing else."""
    found, reasons = [], []
    for place in places:
        try:
            found.append(read(place))
        except DataError as error:
            reasons.append(f"{error}")
    if reasons:
        shown = [*reasons[:5], *(["..."] if len(reasons) > 5 else [])]
        words = f"{len(reasons)} of {len(found) + len(reasons)} {what} cannot be read: {' '.join(shown)}"
        if not found:
            raise DataError(words if len(reasons) > 1 else reasons[0])
        warn(f"Left out: {words}")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds; DataError, which names the place, if it cannot be read."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}. Save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error
