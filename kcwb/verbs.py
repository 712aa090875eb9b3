"""What every public function does before it begins: it checks its settings, and takes its models for itself.

    @verb
    def discover(model: Model, task: Task, ..., edges: Count | None = None, progress: Progress = True) -> Circuit:

Each argument is checked against its annotation (`kcwb.settings`) before anything is computed; a wrong one raises
SettingError, in one line: "discover: edges=2.5 is not a whole number of at least 1, or None." Then the call holds the
locks (`kcwb.locks`) of all models that it was given, also those that an `Edit` or the like brings, to its end.

Where a verb does not say more, `seed` is where all of its random draws start, and `progress` (`kcwb.progress`) is told
of every step, and may cancel there.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from kcwb.errors import SettingError
from kcwb.locks import Exclusive, WeightsLock
from kcwb.settings import fits, plain, shown, words

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)
#: What marks a function as checked: the function below, which tests look for.
MARK = "__kcwb_verb__"
_NOUN = "__kcwb_noun__"


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function check its arguments against their annotations, and hold its models' locks while it runs."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        signature = _signature(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says it in Python's own words
        locks = _check(function, bound)
        if not locks:
            return function(*bound.args, **bound.kwargs)
        with Exclusive(locks, bound.arguments.get("progress", True)):
            return function(*bound.args, **bound.kwargs)

    setattr(call, MARK, function)
    return call


def noun(kind: C) -> C:
    """Have a dataclass check what its instances are made of, as `verb` does."""
    setattr(kind.__init__, _NOUN, kind)
    kind.__init__ = verb(kind.__init__)
    return kind


def check_settings(function: Callable[..., Any], who: str | None = None, /, **settings: Any) -> dict[str, Any]:
    """Check some of a function's arguments without calling it, so before its model is loaded; returns them.

    SettingError, which calls the function `who` (None: by its own name), if one is not what its annotation says.
    """
    function = getattr(function, MARK, function)
    bound = _signature(function).bind_partial(**settings)
    _check(function, bound, who)
    return dict(bound.arguments)


def _check(function: Callable[..., Any], bound: inspect.BoundArguments, who: str | None = None) -> set[WeightsLock]:
    """Check arguments in place, NumPy's numbers becoming Python's; the locks of the models among them."""
    hints, locks = _hints(function), set()
    who = who or function.__qualname__.removesuffix(".__init__")
    for name, value in bound.arguments.items():
        hint = hints.get(name)
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(_checked(who, f"{name}[{i}]", one, hint) for i, one in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: _checked(who, key, one, hint) for key, one in value.items()}
        else:
            bound.arguments[name] = _checked(who, name, value, hint)
            lock = getattr(value, "lock", None)
            if isinstance(lock, WeightsLock):
                locks.add(lock)
    return locks


def _checked(who: str, name: str, value: Any, hint: Any) -> Any:
    if hint is None or fits(value, hint):
        return value
    python = plain(value)
    if python is not value and fits(python, hint):
        return python
    raise SettingError(f"{who}: {name}={shown(value)} is not {words(hint)}.")


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter -> annotation. Resolved at the first call: before, modules may not be whole."""
    owner = getattr(function, _NOUN, None)  # a dataclass's fields may be those of a class in another module
    modules = [function.__module__] if owner is None else [base.__module__ for base in owner.__mro__]
    return typing.get_type_hints(owner or function, localns=_Names(modules), include_extras=True)


class _Names(dict[str, Any]):
    """The names that annotations use: some modules' own, and those that they import for type checkers only."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules = [sys.modules[name] for name in modules]

    def __missing__(self, name: str) -> Any:
        for module in (*self.modules, builtins):
            if name in vars(module):
                return vars(module)[name]
        for module in self.modules:
            for node in ast.walk(ast.parse(inspect.getsource(module))):
                if not isinstance(node, (ast.Import, ast.ImportFrom)):
                    continue
                for one in node.names:
                    if name == (one.asname or one.name):
                        if isinstance(node, ast.Import):
                            return importlib.import_module(one.name)
                        return getattr(importlib.import_module(str(node.module)), one.name)
        raise NameError(name)
