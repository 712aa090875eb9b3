"""Many notebooks at once: a page for each, and an index of them; one that fails stops no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kcwb.errors import DataError, KcwbError, SettingError, nearest
from kcwb.outputs import PAGE, check_output
from kcwb.workbench.report.pdf import find_browser
from kcwb.workbench.report.write import index, parameters_of, report


def series(
    notebooks: Sequence[Path], folder: Path, parameters: Mapping[str, Any], *, pdf: bool = False, **more: Any
) -> Path:
    """Run notebooks and write `folder/<name>.html` for each, and `index.html`, whose path is returned.

    Parameters
    ----------
    parameters
        Given to each notebook that has them; each must be of one at least.
    pdf, more
        As in `report`.

    Raises
    ------
    SettingError
        Before any of them runs, if a page may not be written or a parameter is nobody's.
    KcwbError
        If notebooks failed, after all have run; names each.
    """
    targets = {path: folder / f"{path.stem}.html" for path in notebooks}
    given = _share(notebooks, parameters)
    force = more.get("force", False)
    for target in (*targets.values(), folder / "index.html"):
        check_output(target, PAGE, inputs=notebooks, force=force, make_folder=True)
    if pdf:
        find_browser()
    written, failures = [], []
    for path, target in targets.items():
        before = _changed(target)
        try:
            report(path, target, given[path], pdf=pdf or None, **more)
        except KcwbError as error:
            failures.append(str(error))
        if _changed(target) != before:
            written.append(target)
    if written:
        index(written, folder / "index.html", force=force)
    if failures:
        raise KcwbError("\n- ".join([f"{len(failures)} of {len(notebooks)} notebooks failed:", *failures]))
    return folder / "index.html"


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _share(notebooks: Sequence[Path], parameters: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """Give each notebook of a series the parameters that it has; each must be of one at least."""
    stems = [path.stem for path in notebooks]
    twice = next((stem for stem in [*stems, "index"] if [*stems, "index"].count(stem) > 1), None)
    if twice:
        raise SettingError(f"Two pages of the series would be {twice}.html (index.html lists them). Rename a notebook.")
    known: dict[Path, dict[str, Any]] = {}
    for path in notebooks:
        try:
            known[path] = parameters_of(path)
        except DataError:  # is said when its turn comes
            known[path] = {}
    every = sorted(set().union(*known.values()))
    for name in parameters:
        if name not in every:
            raise SettingError(
                f"None of the notebooks has a parameter {name!r}. {nearest(name, every) if every else ''}"
            )
    return {path: {name: value for name, value in parameters.items() if name in known[path]} for path in notebooks}
