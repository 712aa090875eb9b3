"""The command line: parses, runs a command (`kcwb.commands`), and says what went wrong in one line.

The result goes to stdout; progress, warnings and errors go to stderr. Exit codes: 0; 2 after one line on bad input; 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import kcwb.commands
import kcwb.commands_referee
from kcwb.console import COMMANDS, command, option, say
from kcwb.errors import KcwbError, KcwbWarning, SettingError, choose
from kcwb.workbench.report.run import take_parameters

__all__ = ["command", "main", "option"]


class _Parser(argparse.ArgumentParser):
    """Errors are raised, to be shown like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise SettingError instead of printing the usage."""
        raise SettingError(f"{message}. See {self.prog} --help.")


class _Help(argparse.HelpFormatter):
    """Lines that do not end within a name such as `ig-prune`."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kcwb", description="Knowledge Circuits Workbench.")
    parser.add_argument("--version", action="version", version=f"kcwb {kcwb.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, options) in COMMANDS.items():
        words = run.__doc__ or name
        one = commands.add_parser(
            name, help=words.splitlines()[0].replace("%", "%%"), description=words, formatter_class=_Help
        )
        one.set_defaults(run=run)
        for names, settings in options:
            one.add_argument(*names, **settings)
    return parser


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Silence what libraries log, warn and print; our own warnings are one line each."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", KcwbWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            yield
    finally:
        logging.disable(before)


def _run(argv: Sequence[str]) -> int:
    named = next((word for word in argv if not word.startswith("-")), None)
    if named is not None:
        choose("The command", named, COMMANDS)
    try:
        argv, parameters = take_parameters(argv) if named == "report" else (argv, [])
        args = _parser().parse_args(argv)
        if parameters:
            args.p = parameters
        with _calm():
            data, text = args.run(args)
        print(json.dumps(data, indent=2, allow_nan=False) if args.json else text)
    except SystemExit as done:  # argparse, after --help and --version
        return int(done.code or 0)
    finally:
        sys.stdout.flush()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, with the words after `kcwb` (None: those of the process), and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that a terminal lacks is no reason to fail
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        say("interrupted.")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KcwbError, OSError) as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
