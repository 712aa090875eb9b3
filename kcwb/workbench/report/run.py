"""Running a notebook for a report: its parameters are checked before anything runs, and its file is never touched."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kcwb.errors import DataError, SettingError, choose, nearest
from kcwb.progress import Progress, track

if TYPE_CHECKING:
    from nbformat import NotebookNode

_DEEPEST = 100  # lists within lists; Python's parser gives up at 200
_BRACKETS = ("[", "{", "(")
_JSON_WORDS = {"true": True, "false": False, "null": None}


def parameters_of(notebook: str | Path) -> dict[str, Any]:
    """The names that a notebook's cell tagged `parameters` sets, with their defaults (source text if not a literal)."""
    return defaults_of(read_notebook(Path(notebook)))


def read_parameters(pairs: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Parameters given as text: numbers, `true`, `None`, lists and dicts as in JSON or Python; all else is text.

    For example `[["tau", "-5.5e-3"], ["relation", "country_language"], ["layers", "['a', 1, true]"]]`; quotes make
    text of what would be a number: `'"7"'`.

    Raises
    ------
    SettingError
        If a value cannot be written into a notebook, or is nested too deeply to be read.
    """
    return {name: _plain_value(name, _read_value(name, text)) for name, text in pairs}


def take_parameters(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split a command line into all but each `-p NAME VALUE`, and their names and values.

    argparse takes a value that begins with a dash, such as -5.5e-3, for an option.
    """
    rest, pairs, words = [], [], list(words)
    while words and words[0] != "--":
        if words[0] == "-p" and len(words) > 2:
            pairs.append((words[1], words[2]))
            del words[:3]
        else:
            rest.append(words.pop(0))
    return rest + words, pairs


# --- the notebook and its parameters ---


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook, or raise DataError that says what is wrong with the file."""
    import nbformat

    if not path.is_file():
        others = [other.name for other in sorted(path.parent.glob("*.ipynb"))] if path.parent.is_dir() else []
        raise DataError(f"There is no notebook {path}. {nearest(path.name, others) if others else ''}".strip())
    try:
        notebook: Any = nbformat.reads(path.read_bytes().decode("utf-8"), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises what its parts raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a notebook: {reason[:200]}") from error
    return notebook


def language_of(notebook: NotebookNode) -> str:
    """The notebook's programming language, in small letters; Python if it names none."""
    metadata = notebook.metadata
    named = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
    return str(named or "python").lower()


def defaults_of(notebook: NotebookNode) -> dict[str, Any]:
    """What the cell tagged `parameters` assigns."""
    from IPython.core.inputtransformer2 import TransformerManager

    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if not cells:
        return {}
    try:
        statements = ast.parse(TransformerManager().transform_cell(cells[0].source)).body
    except SyntaxError:
        return {}
    found: dict[str, Any] = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and value is not None:
            found |= {target.id: _literal(value) for target in targets if isinstance(target, ast.Name)}
    return found


def _literal(node: ast.expr) -> Any:
    """A default as a value, where it is one that JSON can hold."""
    try:
        value = ast.literal_eval(node)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, TypeError):
        return ast.unparse(node)


def check_parameters(path: Path, notebook: NotebookNode, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as papermill can write them, or SettingError if one is not the notebook's or cannot be written."""
    known = defaults_of(notebook)
    if parameters and not any("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells):
        raise SettingError(
            f"{path} takes no parameters: none of its cells is tagged 'parameters' (in JupyterLab: property inspector, "
            f"Cell tags). Given: {', '.join(map(str, parameters))}."
        )
    for name in parameters:
        if name not in known:
            listed = ", ".join(f"{key}={value!r}" for key, value in known.items())
            hint = nearest(str(name), known).split("Known:")[0]
            raise SettingError(f"{path} has no parameter {name!r}. {hint} Its parameters: {listed}.".replace("  ", " "))
    return {str(name): _plain_value(str(name), value) for name, value in parameters.items()}


def check_kernel(path: Path, notebook: NotebookNode, kernel: str | None) -> None:
    """Raise SettingError if the kernel is not installed, or none is named for a notebook that is not in Python."""
    from jupyter_client.kernelspec import KernelSpecManager

    if kernel:
        choose("The kernel", kernel, KernelSpecManager().find_kernel_specs())
    elif language_of(notebook) != "python":
        raise SettingError(f"{path} is written in {language_of(notebook)}. Name a kernel that runs it: kernel=…")


def _plain_value(name: str, value: Any, depth: int = 0) -> Any:
    """A value that papermill writes into a cell faithfully."""
    if depth == _DEEPEST and isinstance(value, list | tuple | Mapping):
        raise SettingError(_too_deep(name))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's and torch's numbers
        value = value.item()
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain_value(name, item, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain_value(name, item, depth + 1) for key, item in value.items()}
    raise SettingError(
        f"The parameter {name!r} cannot be {value!r:.80}: None, bool, int, float, valid text, and lists and dicts "
        "(with text as keys) of these can be written into a notebook."
    )


def _too_deep(name: str) -> str:
    return (
        f"The parameter {name!r} is a list or dict nested more than {_DEEPEST} deep, too deep for a cell. Flatten it."
    )


def _read_value(name: str, text: str) -> Any:
    """A value as JSON, else as Python with JSON's words in it, else the text itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Python would say of its own string escapes
        for read in (json.loads, _read_python):
            try:
                value = read(text)
                json.dumps(value, allow_nan=False)  # a set, bytes or an infinity is none of our values
                return value
            except (RecursionError, MemoryError) as error:
                if text.lstrip()[:1] in _BRACKETS:
                    raise SettingError(_too_deep(name)) from error
            except (ValueError, TypeError, SyntaxError) as error:
                if "too many nested" in str(error):
                    raise SettingError(_too_deep(name)) from error
    return text


class _Words(ast.NodeTransformer):
    """JSON's three words, which Python reads as names."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Put the value in."""
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node


def _read_python(text: str) -> Any:
    return ast.literal_eval(_Words().visit(ast.parse(text.strip(), mode="eval")))


# --- running it ---


class Run(NamedTuple):
    """An executed notebook."""

    notebook: NotebookNode  # with outputs; up to and with the cell that failed, if one did
    error: str | None  # the failure's last line
    number: int | None  # of the cell that failed, in the notebook as it is on disk, from 1
    not_run: int  # how many code cells follow it


def execute(
    source: NotebookNode,
    parameters: Mapping[str, Any],
    folder: Path,
    kernel: str | None,
    timeout: float | None,
    progress: Progress,
) -> Run:
    """Run a copy in `folder` with papermill.

    Parameters are those of `reports.report`, checked. What `progress` raises ends the run and is passed on.
    """
    notebook, at, error = _run_copy(source, parameters, folder, kernel, timeout, progress)
    cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", ())]
    notebook.cells = cells
    if error == "":  # papermill also says so of cells whose tag allows them to raise
        failed = [i for i, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("exception")]
        at, error = (failed[0], _last_line(cells[failed[0]])) if failed else (0, None)
    if error is None:
        return Run(notebook, None, None, 0)
    notebook.cells = cells[: at + 1]
    added = sum("injected-parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells)
    added = min(added, len(cells) - len(source.cells))  # 0 if the notebook came with that cell
    return Run(notebook, error, at + 1 - added, sum(map(_runs, cells[at + 1 :])))


def _run_copy(
    source: NotebookNode,
    parameters: Mapping[str, Any],
    folder: Path,
    kernel: str | None,
    timeout: float | None,
    progress: Progress,
) -> tuple[Any, int, str | None]:
    """The executed notebook, the index of the last cell that was begun, and an error: empty if a cell holds it."""
    import nbformat
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    at, error = 0, None
    manager: dict[str, Any] = {} if kernel else {"kernel_manager_class": _this_interpreter()}
    total = sum(map(_runs, source.cells)) + bool(parameters)
    with tempfile.TemporaryDirectory(prefix="kcwb-report-") as room, track(progress, total, "notebook") as step:

        def begun(cell: Any, cell_index: int) -> None:
            nonlocal at
            at = cell_index

        def done(cell: Any, cell_index: int, execute_reply: Any) -> None:
            step(note=f"cell {cell_index + 1}")

        copy, result = Path(room) / "copy.ipynb", Path(room) / "executed.ipynb"
        nbformat.write(source, copy)
        try:
            execute_notebook(
                copy,
                result,
                dict(parameters),
                kernel_name=kernel or "python3",
                language=language_of(source),
                progress_bar=False,
                execution_timeout=None if timeout is None else max(1, math.ceil(timeout)),
                resources={"metadata": {"path": str(folder)}},
                on_cell_start=begun,
                on_cell_executed=done,
                **manager,
            )
        except PapermillExecutionError:
            error = ""
        except CellTimeoutError:
            error = f"TimeoutError: the cell took more than {timeout:g} s."
        except DeadKernelError:
            error = "DeadKernelError: the kernel died. Often it ran out of memory."
        return nbformat.read(result, as_version=4), at, error


def _runs(cell: Any) -> bool:
    return cell.cell_type == "code" and bool(cell.source.strip())


@cache
def _this_interpreter() -> type:
    """A kernel manager that starts the running interpreter, whatever kernels are installed."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    argv = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
    argv += ["-f", "{connection_file}", "--log-level=ERROR"]

    class ThisInterpreter(AsyncKernelManager):
        """Starts `sys.executable`."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    return ThisInterpreter


def _last_line(cell: Any) -> str:
    text = "the cell failed without a message"
    for output in cell.get("outputs", ()):
        if output.output_type == "error":
            lines = re.sub(r"\x1b\[[0-9;]*m", "", output.evalue).strip().splitlines()
            text = ": ".join([output.ename, *lines[-1:]])[:1000]
    return text if text.endswith((".", "!", "?")) else f"{text}."
