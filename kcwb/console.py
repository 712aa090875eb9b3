"""What commands are made of: their registration, the options that several have, how they load and how they print.

A command is one function from parsed arguments to what `--json` prints and to the text that is printed otherwise. Its
name and docstring are its help; `@command(...)` lists its arguments.

Nothing heavy is imported before a command needs it, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcwb.errors import CircuitError
from kcwb.tasks.relations import Relation, load_relation, relation_files

if TYPE_CHECKING:
    import pandas as pd

    from kcwb.models.loading import Model

Command = Callable[[argparse.Namespace], tuple[Any, str]]
COMMANDS: dict[str, tuple[Command, tuple[Any, ...]]] = {}


def say(words: str) -> None:
    """Tell something on stderr, in one line."""
    print("kcwb:", " ".join(words.splitlines()), file=sys.stderr)


def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What `add_argument` is to be called with."""
    return names, settings


def command(*options: Any) -> Callable[[Command], Command]:
    """Make a function a command with these options, and with `--json`."""

    def register(run: Command) -> Command:
        COMMANDS[run.__name__] = run, (*options, option("--json", action="store_true", help="print JSON"))
        return run

    return register


def template_of(text: str) -> int | str:
    """A template's number, or the text of one."""
    return int(text) if text.removeprefix("-").isdecimal() else text


def selection_of(text: str) -> str | float:
    """The name of a selection, or what a negative score counts for."""
    with contextlib.suppress(ValueError):
        return float(text)
    return text


RUNNING = (
    option("--device", default="auto", help="auto (CUDA if there is one, else CPU), cpu, cuda, cuda:1, ..."),
    option("--quiet", action="store_true", help="show no progress on stderr"),
)
AS_FILE = (
    option("--model", help="built-in name, hub name or local folder (default, here and below: as the file says)"),
    option("--relation", help="the name of a relation, or a .json file"),
    option("--template", type=template_of, help="a zero-shot template's number, or text with {}"),
    option("--ablation", help="what a cut edge delivers: zero, mean, resample, or name(setting=value)"),
    option("--dtype", help="float32, bfloat16 or float16"),
)
FORCE = option("--force", action="store_true", help="overwrite also a file that kcwb did not write")


def given_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named arguments that the command has and that were given."""
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def remade(provenance: Mapping[str, Any], where: Path, args: argparse.Namespace) -> tuple[Relation, dict[str, Any]]:
    """The relation that a circuit was found on, or the one that was asked for; the same of its model and the like."""
    from kcwb.circuits.provenance import remade_from
    from kcwb.tasks.task import make_task
    from kcwb.verbs import check_settings

    said = {"dtype": "float32", "prepend_bos": None, "facts": 8, "seed": 0, "template": 0}
    said |= remade_from(provenance, where)
    if not ("model" in said or args.model or "relation" in said or args.relation):
        raise CircuitError(f"{where} says neither model nor relation. Name them with --model and --relation.")
    relation = _relation(said, where, args.relation)
    said |= given_of(args, "model", "dtype", "facts", "seed", "template")
    if "model" not in said:
        raise CircuitError(f"{where} does not say which model it is of. Name it with --model.")
    relation.template(said["template"])  # told before a model is loaded, as is the next
    check_settings(make_task, n=said["facts"], seed=said["seed"])
    return relation, said


def _relation(said: dict[str, Any], where: Path, asked: str | None) -> Relation:
    found_on = f"{where} was found on the relation {said.get('relation')!r}"
    name = asked or said.get("relation")
    if name is None:
        raise CircuitError(f"{where} does not say which relation it was found on. Name it with --relation.")
    if not (asked or name in relation_files()):
        raise CircuitError(f"{found_on}, which does not come with the package. Give its file: --relation PATH.json.")
    relation = load_relation(name)
    if said.get("digest", relation.digest) != relation.digest:
        if asked is None:
            raise CircuitError(
                f"{found_on} with other contents than the one that comes with the package. Give its file, --relation "
                f"PATH.json, or ask for the package's, --relation {name}."
            )
        say(f"warning: {found_on} with other contents than {asked}.")
    return relation


def hushed(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Keep off stderr what libraries show there, if that is asked for."""
    return contextlib.redirect_stderr(io.StringIO()) if args.quiet else contextlib.nullcontext()


def load(args: argparse.Namespace, name: str, dtype: str, prepend_bos: bool | None = None) -> Model:
    """The model, on the device that is asked for."""
    from kcwb.models.loading import load_model

    with hushed(args):
        return load_model(name, device=args.device, dtype=dtype, prepend_bos=prepend_bos)


def records(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows of a table, ready for JSON: what is not a number becomes None."""
    return [{key: None if value != value else value for key, value in row.items()} for row in frame.to_dict("records")]


def as_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 2) -> str:
    """As many columns of text as there are headers; those of numbers are flush right."""
    columns = []
    for header, *values in zip(headers, *rows, strict=False):
        cells = [header, *(_cell(value, digits) for value in values)]
        width = max(map(len, cells))
        left = any(isinstance(value, str | Path) for value in values)
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
