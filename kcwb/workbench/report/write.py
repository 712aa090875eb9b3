"""Notebooks as reports: re-run with parameters, written as one offline HTML file (and PDF), with an index of a series.

The steps of `report`:

1. read the notebook and check the parameters against its cell tagged ``parameters``, before anything runs;
2. execute a temporary copy with papermill, in the notebook's folder and with the running interpreter;
3. collect the provenance that cells displayed;
4. write the page. A cell that fails ends the run; the page then shows what there is, and the error.

From the command line: ``kcwb report``; many notebooks at once: `kcwb.workbench.report.series`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.files import write_text
from kcwb.outputs import PAGE, PDF, check_output, settle
from kcwb.progress import Progress
from kcwb.settings import Positive
from kcwb.verbs import verb
from kcwb.versions import versions
from kcwb.workbench.report.harmless import policy
from kcwb.workbench.report.headline import headlines
from kcwb.workbench.report.page import facts_table, notebook_body, render
from kcwb.workbench.report.pdf import find_browser, write_pdf
from kcwb.workbench.report.provenance import collect, provenance
from kcwb.workbench.report.run import (
    Run,
    check_kernel,
    check_parameters,
    defaults_of,
    execute,
    parameters_of,
    read_notebook,
    read_parameters,
)

__all__ = ["index", "parameters_of", "provenance", "read_parameters", "report", "write_pdf"]

_FORMAT = "kcwb-report/1"
_ABOUT = re.compile(r'<script type="application/json" id="kcwb-report">(.*?)</script>', re.DOTALL)


@verb
def report(
    notebook: str | Path,
    output: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    pdf: bool | str | Path | None = None,
    hide_code: bool = False,
    kernel: str | None = None,
    timeout: Positive | None = None,
    force: bool = False,
    progress: Progress = True,
) -> Path:
    """Run a notebook and write it as one HTML file that opens without a network.

    The notebook itself is not changed. It runs in its own folder, so that relative paths in it work.

    Parameters
    ----------
    notebook
        The notebook.
    output
        The HTML file; by default the notebook's name, in the current folder.
    parameters
        Values for names that the notebook's cell tagged `parameters` sets: None, bool, int, float, str, and lists
        and dicts of these.
    pdf
        Also write a PDF, with Chromium: a path, or True for the name of the HTML file.
    hide_code
        Leave the code out.
    kernel
        A Jupyter kernel's name; by default the running interpreter, whatever the notebook names.
    timeout
        Seconds that a cell may take; by default as long as it wants.
    force
        Overwrite also files that kcwb did not write; the notebook never.
    progress
        Progress over the notebook's code cells.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    SettingError
        If a parameter is not one of the notebook's, has a value that cannot be passed, the output cannot be written
        or is a file that is not ours, or a PDF is wanted and there is no Chromium. Nothing was run.
    DataError
        If the notebook is missing or is not one.
    KcwbError
        If a cell failed: says which and why. The report up to there has been written.
    """
    path = Path(notebook)
    target = Path(output) if output is not None else Path(f"{path.stem}.html")
    source = read_notebook(path)
    given = check_parameters(path, source, parameters or {})
    check_kernel(path, source, kernel)
    printed = target.with_suffix(".pdf") if pdf is True else Path(pdf) if pdf else None
    if target.suffix.lower() in (".pdf", ".ipynb"):
        raise SettingError(f"A report is an HTML file: name it {target.stem}.html, and ask for a PDF beside it.")
    check_output(target, PAGE, what="The report", inputs=[path], force=force, make_folder=True)
    if printed is not None:
        check_output(printed, PDF, what="The PDF", inputs=[path, target], force=force, make_folder=True)
        find_browser()
    about = {
        "format": _FORMAT,
        "notebook": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": defaults_of(source) | given,
        "given": list(given),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }
    clock = time.perf_counter()
    run = execute(source, given, path.resolve().parent, kernel, timeout, progress)
    about |= {
        "seconds": round(time.perf_counter() - clock, 2),
        "error": run.error,
        "failed_cell": run.number,
        "not_run": run.not_run,
        "provenance": collect(run.notebook),
        "headlines": headlines(run.notebook),
    }
    target = settle(target, PAGE, force=force)
    write_text(target, _page(run, about, path, hide_code))
    if printed is not None:
        write_pdf(target, settle(printed, PDF, force=force), force=force)
    if run.error:
        raise KcwbError(f"{path} stopped at {_where(run)}: {run.error} The report up to there is {target}.")
    return target


def index(reports: Iterable[str | Path], output: str | Path, *, force: bool = False) -> Path:
    """Write a page that lists reports: title, first paragraph, parameters, size and date of each.

    Parameters
    ----------
    reports
        HTML files that `report` wrote, in the order of the page.
    output
        The page; links to the reports are relative to it.
    force
        Overwrite also a file that kcwb did not write.

    Raises
    ------
    DataError
        If a file is missing or is not a report.
    SettingError
        If the page cannot be written, or would replace a report or a file that is not ours.
    """
    target, reports = Path(output), list(reports)
    check_output(target, PAGE, what="The index", inputs=reports, force=force, make_folder=True)
    rows = []
    for path in map(Path, reports):
        link = quote(_relative(path, target.parent))
        pdf = path.with_suffix(".pdf")
        rows.append(
            _read_about(path)
            | {"link": link, "size": path.stat().st_size}
            | {"pdf": quote(_relative(pdf, target.parent)) if pdf.is_file() else None}
        )
    write_text(target, render("series.html.j2", reports=rows, policy=policy()))
    return target


# --- what is written ---


def _page(run: Run, about: dict[str, Any], path: Path, hide_code: bool) -> str:
    from markupsafe import Markup, escape

    failed_at = run.notebook.cells[-1].get("id") if run.error else None
    body = notebook_body(run.notebook, path.resolve().parent, hide_code=hide_code)
    about |= {"title": body.title or path.stem, "summary": body.summary}
    return render(
        "page.html.j2",
        about=about,
        heading=Markup(body.heading) if body.heading else escape(path.stem),
        cells=Markup(body.cells),
        provenance=Markup(facts_table(about["provenance"])),
        failed_at=f"cell-id={failed_at}" if failed_at else None,
        policy=policy(graphs=body.graphs),
    )


def _where(run: Run) -> str:
    first = (run.notebook.cells[-1].source.strip().splitlines() or [""])[0]
    return f"cell {run.number} ({first[:60]}{'…' if len(first) > 60 else ''})"


def _read_about(path: Path) -> dict[str, Any]:
    try:
        match = _ABOUT.search(path.read_bytes().decode("utf-8"))
        about = json.loads(match[1]) if match else {}
    except OSError as error:
        raise DataError(f"The report {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Was its writing cut off?") from error
    if about.get("format") != _FORMAT:
        raise DataError(f"{path} is not a report of this workbench.")
    return about


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
