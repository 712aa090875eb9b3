"""Prompts of anybody's own become a task: a table of clean and corrupted prompts, right and wrong answers.

    clean                       corrupted                   answer        wrong       subject
    When Mary and John went     When Mary and Eva went      Mary          John        John
    The war ran from 1732 to 17 The war ran from 1701 to 17 4|5|6|7|8|9   0|1|2

Rows are counted from 1, the line with the columns' names not. Every row becomes a `Fact` whose subject is the whole
prompt, and the table a `Relation` of the single template `{}`: so all that takes a relation takes it, by itself, as its
own file (`Relation.save`) or as the table's path. What has to name a subject and put it elsewhere (demonstrations,
edits, chains, masked prompts, studies of wrong answers) refuses it. Head roles and the logit lens look at the
subject's tokens: they need the column `subject`, and look at the first right answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kcwb.errors import DataError, nearest
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Natural, Seed
from kcwb.tasks.relations import TABLES, Fact, Relation, check_prompt, check_text
from kcwb.tasks.subjects import places
from kcwb.tasks.task import Task, make_task
from kcwb.tasks.tokens import encode_one
from kcwb.verbs import verb

#: The columns that are read; the first two must be there.
COLUMNS = ("clean", "answer", "corrupted", "wrong", "subject", "space")
#: Other names that they go by.
_ALIASES = {
    "prompt": "clean",
    "answers": "answer",
    "wrong_answer": "wrong",
    "wrong_answers": "wrong",
    "span": "subject",
}
_BETWEEN = "|"
_SPAN = re.compile(r"(\d+):(\d+)")


@verb
def make_task_from_pairs(
    model: Model,
    table: pd.DataFrame | str | Path,
    *,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    space: bool | None = None,
    n: Count = 8,
    seed: Seed = 0,
    foil: str | None = None,
    n_test: Natural | None = None,
    progress: Progress = False,
) -> Task:
    """Make a task of a table of prompts: `read_pairs`, then `make_task`.

    Prompts may differ in length, and answers have any number of tokens. Of several right answers, which must have all
    tokens but the last one in common, the loss is that of their summed probability, and the rank that of the best one
    (`kcwb.tasks.metrics`, `kcwb.tasks.ranks`). Prompts whose answer the model does not know (rank above 10) are left
    out of D_val.

    Parameters
    ----------
    model
        The model that is to know the answers.
    table, name, columns, space
        As in `read_pairs`.
    n, seed, foil, n_test, progress
        As in `make_task`. Foils are a prompt's wrong answers, where it has some and no `foil` is named. Where no
        corrupted prompt is given, another row's of as many tokens and with other answers stands for it.

    Returns
    -------
    Task
        With which everything works that takes a task; `task.relation` can be saved.

    Warns
    -----
    UserWarning
        As `make_task`: of corrupted prompts that have not as many tokens as the clean one, which are not used.

    Raises
    ------
    DataError
        As `read_pairs` and `make_task`; if an answer runs into the last token of its prompt, or right answers differ
        before their last token: names the row.

    Examples
    --------
    >>> table = pd.DataFrame(
    ...     {
    ...         "clean": ["2, 4, 6,", "5, 10, 15,", "10, 20, 30,"],
    ...         "corrupted": ["9, 4, 7,", "5, 90, 16,", "60, 20, 31,"],
    ...         "answer": ["8", "20", "40"],
    ...     }
    ... )
    >>> task = kcwb.make_task_from_pairs(model, table, name="sequences")  # doctest: +SKIP
    """
    relation = read_pairs(table, name=name, columns=columns, space=space)
    for row, fact in enumerate(relation.facts, start=1):
        try:
            encode_one(model, fact, "{}")
        except DataError as error:
            raise DataError(f"{relation.name}, row {row}: {error}") from error
    return make_task(model, relation, n=n, seed=seed, foil=foil, n_test=n_test, progress=progress)


@verb
def read_pairs(
    table: pd.DataFrame | str | Path,
    *,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    space: bool | None = None,
) -> Relation:
    """Read a table of prompts as a relation.

    Parameters
    ----------
    table
        A DataFrame, or the path of a file: `.csv`, `.tsv`, `.jsonl` (an object per line) or `.parquet`. Its columns, of
        which only the first two must be there and a cell of the others may be empty:

        - `clean`: the prompt's text;
        - `answer`: what is right after it, one or several: a list, or text with `|` between them. The first one is the
          one that is written where a single answer is asked for;
        - `corrupted`: the corrupted prompt. It is used if it has as many tokens as the clean one;
        - `wrong`: one or several answers that are wrong, as in `answer`; none: those of the other rows are;
        - `subject`: what in the prompt is its subject: a text that stands in it once, or [start, stop], the characters
          from and to which it stands, in text `start:stop`;
        - `space`: whether a space stands between prompt and answer, as in `space` below.

        Other columns are not read.
    name
        What to call the relation; None: as the file without its ending, or `pairs`.
    columns
        What these columns are called in the table, where it is otherwise: `{"clean": "sentence"}`.
    space
        Whether a space stands between prompt and answer. None: as the column `space` says, else unless the prompt ends
        in white space.

    Returns
    -------
    Relation
        One fact per row, in order.

    Raises
    ------
    DataError
        If the file cannot be read, a column is missing, or a cell is not what it must be: names the row.
    """
    if not isinstance(table, pd.DataFrame):
        path = Path(table)
        table, name = read_table(path), name or path.stem
        where = str(path)
    else:
        where = "The table"
    given = _columns(table, dict(columns or {}), where)
    facts: list[Fact] = []
    rows: dict[str, int] = {}
    for row, cells in enumerate(zip(*(table[given[key]] for key in given), strict=True), start=1):
        place = f"{where}, row {row}"
        found = {key: cell for key, cell in zip(given, cells, strict=True) if not is_empty(cell)}
        fact = _fact(found, place, space)
        if rows.setdefault(fact.subject, row) != row:
            raise DataError(
                f"{place}: the prompt {fact.subject!r:.60} stands in row {rows[fact.subject]} already. Leave one out; "
                "several right answers go into one row."
            )
        facts.append(fact)
    if not facts:
        raise DataError(f"{where} has no rows.")
    return Relation(name or "pairs", "own prompts", "prompt", "answer", False, ("{}",), ("{}",), tuple(facts))


def _columns(table: pd.DataFrame, renamed: dict[str, str], where: str) -> dict[str, str]:
    """Which of the table's columns is which of `COLUMNS`."""
    known, there = {str(name): name for name in table.columns}, list(map(str, table.columns))
    for key, name in renamed.items():
        if key not in COLUMNS:
            raise DataError(f"columns: {key!r:.60} is no column that is read. {nearest(key, COLUMNS)}")
        if name not in known:
            raise DataError(f"{where} has no column {name!r:.60} for {key!r}. {nearest(name, there)}")
        if there.count(name) > 1:
            raise DataError(f"{where} has {there.count(name)} columns {name!r:.60}, for {key!r}. Leave one.")
    given = dict(renamed)
    for name in there:
        key = _ALIASES.get(name, name)
        if name in renamed.values():
            continue
        if key in given:
            raise DataError(f"{where} has two columns for {key!r}: {given[key]!r:.60} and {name!r:.60}. Leave one out.")
        if key in COLUMNS:
            given[key] = name
    for key in COLUMNS[:2]:
        if key not in given:
            raise DataError(
                f"{where} has no column {key!r}; it has {', '.join(there)[:200] or 'none'}. Say which it is: "
                f'columns={{"{key}": ...}}.'
            )
    return {key: known[given[key]] for key in COLUMNS if key in given}


def _fact(cells: Mapping[str, Any], where: str, space: bool | None) -> Fact:
    """One row; its empty cells are left out."""
    for key in COLUMNS[:2]:
        if key not in cells:
            raise DataError(f"{where}: the cell {key!r} is empty.")
    if space is None:
        space = _said(cells["space"], f"{where}, space") if "space" in cells else not str(cells["clean"])[-1:].isspace()
    prompt = check_prompt(cells["clean"], f"{where}, clean", space)
    corrupted = check_prompt(cells["corrupted"], f"{where}, corrupted", space) if "corrupted" in cells else ""
    if corrupted == prompt:
        raise DataError(f"{where}: the corrupted prompt is the clean one. Leave the cell empty, or change it.")
    right = _texts(cells["answer"], f"{where}, answer")
    wrong = _texts(cells.get("wrong", []), f"{where}, wrong")
    if both := [text for text in wrong if text in right]:
        raise DataError(f"{where}: {both[0]!r:.60} is both a right answer and a wrong one.")
    span = _span(cells["subject"], prompt, f"{where}, subject") if "subject" in cells else (0, 0)
    return Fact(prompt, right[0], right[1:], wrong, corrupted, span, space)


def _texts(cell: Any, where: str) -> tuple[str, ...]:
    """One text or several, each once."""
    if isinstance(cell, str):
        cell = cell.split(_BETWEEN)
    if not _listed(cell):
        raise DataError(f"{where}: expected a text or a list of texts, found {cell!r:.60}.")
    found = [check_text(text, f"{where}[{i}]" if len(cell) > 1 else where, True) for i, text in enumerate(cell)]
    return tuple(dict.fromkeys(found))


def _span(cell: Any, prompt: str, where: str) -> tuple[int, int]:
    """Where a subject stands in its prompt: as whole words, or else where its letters do."""
    if isinstance(cell, str):
        at = places(prompt, cell) or [found.start() for found in re.finditer(re.escape(cell), prompt)]
        if len(at) == 1:
            return at[0], at[0] + len(cell)
        numbers = _SPAN.fullmatch(cell.strip())
        if numbers is None or at:
            raise DataError(
                f"{where}: {cell!r:.60} stands {len(at)} times in {prompt!r:.120}; it must stand there once. Else say "
                "from and to which character it stands: [start, stop], in text start:stop."
            )
        cell = [int(numbers[1]), int(numbers[2])]
    ends = [int(end) for end in cell if isinstance(end, (int, np.integer))] if _listed(cell) else []
    if len(ends) != 2 or len(cell) != 2 or not 0 <= ends[0] < ends[1] <= len(prompt):
        raise DataError(
            f"{where}: {cell!r:.60} is neither a text nor [start, stop] within the {len(prompt)} characters of "
            f"{prompt!r:.120}."
        )
    return ends[0], ends[1]


def _said(cell: Any, where: str) -> bool:
    words = {"true": True, "false": False}
    if isinstance(cell, (bool, np.bool_)) or (isinstance(cell, str) and cell.strip().lower() in words):
        return words[str(cell).strip().lower()]
    raise DataError(f"{where}: expected true or false, found {cell!r:.60}.")


def _listed(cell: Any) -> bool:
    return isinstance(cell, (list, tuple, np.ndarray))


def is_empty(cell: Any) -> bool:
    """Whether a cell is None, NaN, no text or an empty list."""
    if _listed(cell):
        return len(cell) == 0
    return cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)) or cell == ""


def read_table(path: Path) -> pd.DataFrame:
    """What a file holds, text as it is written there."""
    if path.suffix not in TABLES:
        raise DataError(f"{path} is no table that is read; the name of one ends in {', '.join(TABLES)}.")
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        if path.suffix == ".jsonl":
            return pd.DataFrame(_objects(path.read_text(encoding="utf-8-sig").split("\n"), path), dtype=object)
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        between = "\t" if path.suffix == ".tsv" else ","
        # names read as a row: else pandas takes what a row has too many of for its index, and renames what comes twice
        rows = pd.read_csv(path, sep=between, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        return rows.iloc[1:].set_axis(rows.iloc[0].tolist(), axis=1)
    except ImportError as error:
        raise DataError(
            f"{path}: pandas reads a .parquet file with pyarrow, which is not installed: pip install pyarrow. Or write "
            "it as .jsonl where it is."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}. Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a table: {str(error).strip():.200}.") from error


def _objects(lines: Iterable[str], path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line without one is no row."""
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}.") from error
        if not isinstance(one, dict):
            raise DataError(f"{path}, line {number}: expected an object with keys, found {one!r:.60}.")
        found.append(one)
    return found
