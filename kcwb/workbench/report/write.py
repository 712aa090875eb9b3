"""Notebooks as reports: re-run with parameters, written as one offline HTML file (and PDF), with an index of a series.

The steps of `report`:

1. read the notebook and check the parameters against its cell tagged ``parameters``, before anything runs;
2. execute a temporary copy with papermill, in the notebook's folder and with the running interpreter;
3. collect the provenance that cells displayed;
4. write the page. A cell that fails ends the run; the page then shows what there is, and the error.

From the command line: ``python -m kcwb.workbench.report.write NOTEBOOKS... --out FOLDER [-p NAME VALUE]... [--pdf]``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.files import atomic_path, write_text
from kcwb.outputs import PAGE, PDF, PDF_MARK, check_output, settle
from kcwb.progress import Progress
from kcwb.settings import Positive
from kcwb.verbs import verb
from kcwb.versions import versions
from kcwb.workbench.report.harmless import policy
from kcwb.workbench.report.page import facts_table, notebook_body, render
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

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from kcwb.circuits.circuit import Circuit
    from kcwb.models.loading import Model
    from kcwb.tasks.prompts import Task

__all__ = ["index", "parameters_of", "provenance", "read_parameters", "report", "write_pdf"]

PROVENANCE = "application/vnd.kcwb.provenance+json"
"""The type of output whose content goes into the footer of a report: `{"entries": [{"kind", "name", "digest", …}]}`."""

_FORMAT = "kcwb-report/1"
_ABOUT = re.compile(r'<script type="application/json" id="kcwb-report">(.*?)</script>', re.DOTALL)
_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
_BROWSER_ON_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


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
        _browser()
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
        "provenance": _collect(run.notebook),
    }
    target = settle(target, PAGE, force=force)
    write_text(target, _page(run, about, path, hide_code))
    if printed is not None:
        write_pdf(target, settle(printed, PDF, force=force), force=force)
    if run.error:
        raise KcwbError(f"{path} stopped at {_where(run)}: {run.error} The report up to there is {target}.")
    return target


@verb
def provenance(model: Model | None, *tasks_or_circuits: Task | Circuit) -> None:
    """Display what a notebook's results come from, as a small table; reports repeat it in their footer.

    Parameters
    ----------
    model
        The model that was used.
    tasks_or_circuits
        The tasks, for their data, and the circuits, for how they were found.
    """
    from IPython.display import display

    entries = [] if model is None else [_describe_model(model.name, model.digest, str(model.dtype), str(model.device))]
    for item in tasks_or_circuits:
        entries += _describe(item)
    entries = _distinct(entries)
    lines = [" ".join(str(entry.get(key, "")) for key in ("kind", "name", "digest")) for entry in entries]
    bundle = {PROVENANCE: {"entries": entries}, "text/html": facts_table(entries), "text/plain": "\n".join(lines)}
    display(bundle, raw=True)


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


def write_pdf(page: str | Path, output: str | Path | None = None, *, force: bool = False) -> Path:
    """Print an HTML file to PDF with Chromium.

    Parameters
    ----------
    page
        The HTML file.
    output
        The PDF; by default beside the page.
    force
        Overwrite also a file that kcwb did not write.

    Raises
    ------
    SettingError
        If there is no Chromium or Chrome, or the PDF cannot be written or would replace a file that is not ours.
    KcwbError
        If it fails or takes more than two minutes.
    """
    page = Path(page)
    target = Path(output) if output is not None else page.with_suffix(".pdf")
    check_output(target, PDF, what="The PDF", inputs=[page], force=force, make_folder=True)
    with tempfile.TemporaryDirectory(prefix="kcwb-chromium-") as profile, atomic_path(target) as draft:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags += [f"--user-data-dir={profile}", "--no-pdf-header-footer", "--virtual-time-budget=15000"]
        flags.append("--disable-features=IsolateSandboxedIframes")  # time must pass in the frames of graphs, too
        command = [_browser(), *flags, f"--print-to-pdf={draft}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
        except subprocess.TimeoutExpired as error:
            raise KcwbError(f"Chromium took more than two minutes to print {page}; the HTML file is whole.") from error
        if done.returncode or not draft.stat().st_size:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise KcwbError(f"Chromium could not print {page} (exit code {done.returncode}): {last}")
        with draft.open("ab") as file:
            file.write(PDF_MARK)
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


def _browser() -> str:
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None and Path(_BROWSER_ON_MAC).is_file():
        found = _BROWSER_ON_MAC
    if found is None:
        raise SettingError(
            "A PDF needs Chromium or Chrome, and none was found. Install it (for example: apt install chromium), or "
            "open the HTML report in a browser and print it."
        )
    return found


# --- provenance ---


def _describe_model(name: str, digest: str, dtype: str, device: str) -> dict[str, Any]:
    return {"kind": "model", "name": name, "digest": digest, "dtype": dtype.removeprefix("torch."), "device": device}


def _describe(item: Task | Circuit) -> list[dict[str, Any]]:
    from kcwb.circuits.circuit import Circuit
    from kcwb.tasks.prompts import Task

    if isinstance(item, Task):
        relation = {"kind": "relation", "name": item.relation.name, "digest": item.relation.digest}
        sizes = {"D_val": len(item.val), "D_test": len(item.test), "known": f"{item.n_known} of {item.n_facts}"}
        return [relation | {"template": item.template, "n": item.n, "seed": item.seed} | sizes]
    if isinstance(item, Circuit):
        return [*_sources(item.provenance), _describe_circuit(item)]
    raise SettingError(f"provenance describes tasks and circuits, not {type(item).__name__}.")


def _describe_circuit(circuit: Circuit) -> dict[str, Any]:
    made = circuit.provenance
    keys = ("method", "metric", "ablation", "parameters", "template", "n", "seed", "seconds")
    name = made["relation"]["name"] if "relation" in made else made.get("method", "circuit")
    size: dict[str, Any] = {"edges": f"{circuit.n_edges:,} of {circuit.graph.n_edges:,}"}
    if "of" in made:
        size["of"] = ", ".join(_origin(part) for part in made["of"])
    details = {key: made[key] for key in keys if key in made and made[key] not in (None, {}, [])}
    return {"kind": "circuit", "name": name, "digest": circuit.digest} | size | details


def _origin(made: Mapping[str, Any]) -> str:
    """What one of the circuits that a circuit was made of was: `acdc of country_capital`."""
    words = [made.get("method", "a circuit"), *(["of", made["relation"]["name"]] if "relation" in made else [])]
    inside = ", ".join(_origin(part) for part in made.get("of", ()))
    return " ".join(map(str, words)) + (f" ({inside})" if inside else "")


def _sources(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models and relations that a circuit, or those it was made of, come from."""
    found = []
    if "model" in made:
        model = made["model"]
        found.append(_describe_model(model["name"], model["digest"], model.get("dtype", ""), model.get("device", "")))
    if "relation" in made:
        found.append({"kind": "relation", "name": made["relation"]["name"], "digest": made["relation"]["digest"]})
    for part in made.get("of", ()):
        found += _sources(part)
    return found


def _distinct(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each thing once, with all that is said of it, in the order of first mention: models, data, circuits.

    Two circuits of the same edges that were found in different ways are two things.
    """
    found: list[dict[str, Any]] = []
    for entry in entries:
        same = next((other for other in found if _same(other, entry)), None)
        if same is None:
            found.append(dict(entry))
        else:
            same.update(entry)
    order = ("model", "relation", "circuit")
    return sorted(found, key=lambda e: order.index(e["kind"]) if e.get("kind") in order else len(order))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries can be of one thing: the same kind, name and digest, and nothing that differs."""
    named = any(one.get(key) for key in ("kind", "name", "digest"))
    alike = all(one.get(key) == other.get(key) for key in ("kind", "name", "digest"))
    return alike and all(one[key] == other[key] for key in one.keys() & other.keys()) and (named or one == other)


def _collect(notebook: NotebookNode) -> list[dict[str, Any]]:
    """Everything that cells displayed as provenance."""
    entries: list[dict[str, Any]] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            content = output.get("data", {}).get(PROVENANCE)
            if isinstance(content, Mapping):
                listed = content.get("entries")
                entries += listed if isinstance(listed, list) else [{"kind": "result", **content}]
    return _distinct(entry for entry in entries if isinstance(entry, Mapping))


# --- the command line ---
