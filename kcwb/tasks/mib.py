"""Task files of MIB (Mechanistic Interpretability Benchmark, Mueller et al., arXiv 2504.13151) as tables of prompts.

Its circuit localization track (github.com/hannamw/MIB-circuit-track) reads datasets of the hub `mib-bench`: `ioi`,
`copycolors_mcqa`, `arithmetic_addition` and `_subtraction`, `arc_easy` and `_challenge`. A file of one, as the hub
keeps it (.parquet) or written as .jsonl, becomes a relation here. Nothing is downloaded. What its code takes of a row:

    task                  right                      wrong                            corrupted prompt
    ioi                   metadata.indirect_object   metadata.subject                 s2_io_flip_counterfactual.prompt
    mcqa, arc_*           choices.label[answerKey]   the same of the counterfactual   symbol_counterfactual.prompt
    arithmetic_*          label                      label of the counterfactual      random_counterfactual.prompt

As there, rows of `arithmetic_*` without a counterfactual, or with the other operator, are no part of the task. Unlike
there, a number of several tokens stays in (its tokens are all asked for), names of unequal length do (they are not
paired), and an answer is tokenised as it continues its prompt: after a space, unless the prompt ends in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kcwb.errors import DataError, choose, warn
from kcwb.settings import Count
from kcwb.tasks.pairs import is_empty, read_pairs, read_table
from kcwb.tasks.relations import Relation
from kcwb.tasks.subjects import places
from kcwb.verbs import verb

#: Task -> the counterfactual that its corrupted prompts are of by default.
TASKS = {
    "ioi": "s2_io_flip_counterfactual",
    "mcqa": "symbol_counterfactual",
    "arithmetic_addition": "random_counterfactual",
    "arithmetic_subtraction": "random_counterfactual",
    "arc_easy": "symbol_counterfactual",
    "arc_challenge": "symbol_counterfactual",
}
_OPERATORS = {"arithmetic_addition": "+", "arithmetic_subtraction": "-"}


@verb
def load_mib_task(
    path: str | Path, task: str, *, counterfactual: str | None = None, n: Count | None = None
) -> Relation:
    """Read a task file of MIB as a relation of whole prompts (`kcwb.tasks.pairs`).

    Parameters
    ----------
    path
        A `.jsonl` or `.parquet` file of the dataset; pandas reads the latter with pyarrow.
    task
        One of `TASKS`.
    counterfactual
        The column with the corrupted prompts, as `abc_counterfactual`; None: the one that MIB takes.
    n
        Only the first rows; None: all.

    Returns
    -------
    Relation
        Named after the task. Of `ioi` the subject is the giver where it is named last.

    Warns
    -----
    UserWarning
        Of rows that are left out: the same prompt once more, or a counterfactual with the same answer.

    Raises
    ------
    DataError
        If the file cannot be read or a row is not of this form: names the row and what is missing.
    SettingError
        If the task is not known.
    """
    choose("The task", task, TASKS)
    path, name = Path(path), counterfactual or TASKS[task]
    rows: dict[str, dict[str, Any]] = {}
    left_out = 0
    for number, record in enumerate(read_table(path).to_dict("records"), start=1):
        where = f"{path}, row {number}"
        if task in _OPERATORS and not _asked(record, name, _OPERATORS[task]):
            continue
        other = _get(record, name, where)
        row = _row(task, record, other, where)
        row |= {"clean": _get(record, "prompt", where), "corrupted": _get(other, "prompt", f"{where}, {name}")}
        if row["clean"] in rows or row["answer"] == row["wrong"] or row["clean"] == row["corrupted"]:
            left_out += 1
            continue
        rows[row["clean"]] = row
        if len(rows) == n:
            break
    if not rows:
        raise DataError(f"{path} has no row of the task {task}.")
    if left_out:
        warn(
            f"{path}: {left_out} rows are left out, whose prompt stood there before or whose counterfactual has the "
            "same answer or is the same."
        )
    return read_pairs(pd.DataFrame(list(rows.values()), dtype=object), name=task)


def _row(task: str, record: Mapping[Any, Any], other: Any, where: str) -> dict[str, Any]:
    """Right and wrong answer of a row, and its subject."""
    if task == "ioi":
        about = _get(record, "metadata", where)
        right, wrong = (str(_get(about, key, f"{where}, metadata")) for key in ("indirect_object", "subject"))
        at = places(str(_get(record, "prompt", where)), wrong)[-1:]
        return {"answer": [right], "wrong": [wrong], "subject": [at[0], at[0] + len(wrong)] if at else None}
    answers = [_label(one, task, where) for one in (record, other)]
    return {"answer": answers[:1], "wrong": answers[1:]}


def _label(record: Any, task: str, where: str) -> str:
    """The answer of a record, a row or its counterfactual."""
    if task in _OPERATORS:
        return str(_get(record, "label", where))
    labels, key = _get(_get(record, "choices", where), "label", f"{where}, choices"), _get(record, "answerKey", where)
    try:
        return str(labels[int(key)])
    except (TypeError, ValueError, IndexError):
        raise DataError(f"{where}: the answerKey {key!r:.60} is none of the {len(labels)} labels.") from None


def _asked(record: Mapping[Any, Any], name: str, operator: str) -> bool:
    other = record.get(name)
    return record.get("operator") == operator and isinstance(other, Mapping) and bool(other.get("prompt"))


def _get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, Mapping) or is_empty(record.get(key)):
        there = ", ".join(map(str, record)) if isinstance(record, Mapping) else f"{record!r:.60}"
        raise DataError(f"{where}: there is no {key!r} (found: {there:.200}). Is it a file of this task of MIB?")
    return record[key]
