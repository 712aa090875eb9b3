"""The referee's page: a judgement, or several in a ranking, as one HTML file that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kcwb.errors import SettingError
from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES, Judgement
from kcwb.files import write_text
from kcwb.outputs import PAGE, check_output, settle
from kcwb.verbs import verb
from kcwb.workbench import tables, verdicts
from kcwb.workbench.report.harmless import policy
from kcwb.workbench.report.page import render


@verb
def judgement_page(judgement: Judgement, path: str | Path, *, force: bool = False) -> Path:
    """Write what the referee says of a circuit as a page: the verdicts on one screen, all else below.

    Parameters
    ----------
    judgement
        As of `kcwb.referee`.
    path
        The HTML file.
    force
        Overwrite also a file that kcwb did not write.

    Returns
    -------
    Path
        The file; another one beside it where something else has appeared there meanwhile.

    Raises
    ------
    SettingError
        If the file cannot be written, or would replace one that is not ours.
    """
    return _write(path, force, heading=verdicts.title(judgement), headline=verdicts.headline(judgement),
                  all=[_judged("", judgement)])  # fmt: skip


@verb
def ranking_page(
    ranking: pd.DataFrame, judgements: Mapping[str, Judgement], path: str | Path, *, force: bool = False
) -> Path:
    """Write what the referee says of several circuits as a page: their ranking, and below what it says of each.

    Parameters
    ----------
    ranking
        A row per circuit, the best first; the first column has the names.
    judgements
        Name -> what the referee says of it.
    path, force
        As in `judgement_page`.

    Raises
    ------
    SettingError
        As of `judgement_page`, or if there is no judgement.
    """
    if not judgements or ranking.empty:
        raise SettingError("There is no judgement to write a page of.")
    first = next(iter(judgements.values()))
    where = verdicts.title(first).partition(" of ")[2]
    return _write(path, force, heading=f"{len(judgements)} circuits of {where}", headline=_led(ranking),
                  ranking=_safe(_ranked(ranking)), all=[_judged(*one) for one in judgements.items()])  # fmt: skip


def check_page(path: str | Path, *, inputs: Any = (), force: bool = False) -> None:
    """Raise SettingError unless a page may and can be written there; asked before anything is computed."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise SettingError(f"The page {str(path)!r}: the name of a page ends in .html.")
    check_output(path, PAGE, what="The page", inputs=inputs, force=force, make_folder=True)


def _write(path: str | Path, force: bool, **values: Any) -> Path:
    check_page(path, force=force)
    text = render("judgement.html.j2", policy=policy(), **values)
    target = settle(Path(path), PAGE, force=force)
    write_text(target, text)
    return target


def _judged(name: str, judgement: Judgement) -> dict[str, Any]:
    return {
        "name": name,
        "title": verdicts.title(judgement),
        "headline": verdicts.headline(judgement),
        "byline": verdicts.byline(judgement),
        "warning": verdicts.few_facts(judgement),
        "table": _safe(verdicts.verdict_table(judgement)),
        "pictures": [one._replace(body=_safe(one.body)) for one in verdicts.pictures(judgement)],
        "details": [one._replace(body=_safe(one.body)) for one in verdicts.details(judgement)],
        "methods": verdicts.methods(judgement),
        "provenance": judgement.provenance,
    }


def _ranked(ranking: pd.DataFrame) -> str:
    """The ranking as a table; verdicts have their marks."""
    told = verdicts.joined(ranking)
    head = "".join(f"<th>{tables.text(str(name).replace('_', ' '))}</th>" for name in told.columns)
    rows = ("".join(map(_cell, row)) for row in told.itertuples(index=False))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="kc-table kc-ranking"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Any) -> str:
    if isinstance(value, str) and value in (YES, NO, NOT_SHOWN):
        return f"<td>{verdicts.verdict(value)}</td>"
    mark = "" if isinstance(value, str) else ' class="kc-number"'
    return f"<td{mark}>{tables.text(tables.number(value))}</td>"


def _led(ranking: pd.DataFrame) -> str:
    return f"First is {ranking.iloc[0, 0]}; the rows are in the order of the ranking."


def _safe(html: str) -> Any:
    """HTML in which every text is escaped already."""
    from markupsafe import Markup

    return Markup(html)
