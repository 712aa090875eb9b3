"""Every public function checks every setting before it begins, in one line that names what was wrong."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kcwb
from kcwb.discovery.registry import check_method
from kcwb.errors import SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.settings import Count, Positive, fits, plain
from kcwb.tasks.relations import Fact, load_relations
from kcwb.verbs import MARK, _check, check_settings, verb
from kcwb.verbs import _hints as hints_of
from tests.tiny import word_relation

#: What no setting or only some setting can be.
WRONG: list[Any] = [
    True, None, 2, 2.5, math.nan, math.inf, 10**40, -1, "x", "\0", "\ud800", b"x", [], [object()], {"a": object()},
    object(), Path("\0"), torch.zeros(1), complex(1, 1),
]  # fmt: skip
#: Nouns that are made by verbs alone.
MADE = {"Model", "Ablation", "Pruning", "Search"}


def public() -> dict[str, Any]:
    """Name -> function, for all that is public: functions, constructors, and methods that take something."""
    found: dict[str, Any] = {}
    for stub in (Path(kcwb.__file__).parent).rglob("__init__.pyi"):
        room = ".".join(("kcwb", *stub.relative_to(Path(kcwb.__file__).parent).parent.parts))
        # panels take widgets' values and give them to verbs; plots draw the tables that verbs made
        if room not in ("kcwb.workbench.panels", "kcwb.workbench.plots"):
            module = importlib.import_module(room)
            found |= {
                key: one for name in module.__all__ for key, one in callables(name, getattr(module, name)).items()
            }
    return found


def callables(name: str, value: Any) -> dict[str, Any]:
    """What can be called of a public name."""
    if inspect.isfunction(value):
        return {name: value}
    if not inspect.isclass(value) or issubclass(value, BaseException):
        return {}
    found: dict[str, Any] = {} if name in MADE else {name: value.__init__}
    for key, method in vars(value).items():
        function = getattr(method, "__func__", method)
        takes = inspect.isfunction(function) and len(inspect.signature(function).parameters) > 1
        if takes and not key.startswith("_"):
            found[f"{name}.{key}"] = function
    return found


PUBLIC = public()
#: Methods that take no settings: names and indices of a graph, and what other verbs have checked already.
BARE = {name for name in PUBLIC if name.startswith("Graph.")} | {
    "Ablation.told", "Ablation.usable", "Ablation.values",
    "AblationKind.drawn_again", "AblationKind.fit", "AblationKind.told", "AblationKind.values",
    "CircuitGraph.set_state",
    "Method.refuse",
    "register_ablation",
    "Edit.require_own", "Model.exclusive", "Model.has_weights", "Search.again",
    "Search.commit", "Search.resume", "Search.visit", "ShotTask.groups",
}  # fmt: skip


def settings() -> list[Any]:
    """Each parameter of each public function, but for those that take anything."""
    return [
        pytest.param(function, name, id=f"{where}-{name}")
        for where, function in PUBLIC.items()
        if where not in BARE
        for name in inspect.signature(function).parameters
        if name not in ("self", "cls")
    ]


def test_every_public_function_is_checked():
    assert len(PUBLIC) > 90
    assert [name for name, function in PUBLIC.items() if not hasattr(function, MARK) and name not in BARE] == []


@pytest.mark.parametrize(("function", "name"), settings())
def test_a_wrong_setting_is_refused_in_one_line_before_anything_runs(function, name):
    inner = getattr(function, MARK)
    hint, kind = hints_of(inner).get(name), inspect.signature(inner).parameters[name].kind
    for value in WRONG:
        if hint is None or fits(value, hint) or fits(plain(value), hint):
            continue
        bound = inspect.signature(inner).bind_partial()  # all else is missing, so nothing but the check can run
        named = kind is inspect.Parameter.VAR_KEYWORD
        several = kind is inspect.Parameter.VAR_POSITIONAL
        bound.arguments[name] = {"some": value} if named else (value,) if several else value
        with pytest.raises(SettingError) as caught:
            _check(inner, bound)
        text = str(caught.value)
        text.encode()
        assert ("some" if named else name) in text and " is not " in text
        assert "\n" not in text and "\0" not in text and len(text) < 300


@verb
def scaled(times: Count, by: Positive = 1.0, *more: Count, **named: Positive) -> tuple[Any, ...]:
    """A verb."""
    return times, by, more, named


def test_a_verb_keeps_its_name_words_and_signature():
    assert scaled.__name__ == "scaled" and scaled.__doc__ == "A verb."
    assert list(inspect.signature(scaled).parameters) == ["times", "by", "more", "named"]


@pytest.mark.parametrize(
    ("args", "more", "said"),
    [
        ((True,), {}, "scaled: times=True is not a whole number of at least 1."),
        ((1, math.nan), {}, "scaled: by=nan is not a number above 0."),
        ((1, 1, 2, 2.5), {}, "scaled: more[1]=2.5 is not a whole number of at least 1."),
        ((1,), {"other": 0}, "scaled: other=0 is not a number above 0."),
    ],
)
def test_the_line_says_verb_setting_value_and_what_is_wanted(args, more, said):
    with pytest.raises(SettingError) as caught:
        scaled(*args, **more)
    assert str(caught.value) == said


def test_numbers_of_numpy_arrive_as_pythons_own():
    found = scaled(np.int64(2), np.float64(0.5), np.int32(3), z=np.float32(1))
    assert found == (2, 0.5, (3,), {"z": 1.0})
    assert [type(one) for one in found[:2]] == [int, float]


def test_missing_and_unknown_arguments_are_told_as_python_does():
    with pytest.raises(TypeError, match=r"scaled.. missing 1 required positional argument"):
        scaled()


def test_a_noun_checks_what_it_is_made_of():
    with pytest.raises(SettingError, match=r"^Fact: subject=5 is not text\.$"):
        Fact(5, "x")  # type: ignore[arg-type]
    assert Fact("a", "b") == Fact("a", "b")


def test_settings_are_checked_without_a_call():
    check_settings(completeness, draws=3)
    with pytest.raises(SettingError, match=r"^completeness: draws=-5 is not a whole number of at least 0\.$"):
        check_settings(completeness, draws=-5)
    with pytest.raises(SettingError, match=r"^eap-ig: steps=0 is not a whole number of at least 1\.$"):
        check_method("eap-ig", "nll", steps=0)
    with pytest.raises(SettingError, match=r"^eap-ig: edges=-5 is not a whole number of at least 1 or None\.$"):
        check_method("eap-ig", "nll", edges=-5)


def test_a_warning_is_told_once_where_the_package_was_called(tmp_path):
    word_relation().save(tmp_path / "words.json")
    (tmp_path / "cut off.json").write_text("{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            load_relations(tmp_path)
        load_relations(tmp_path)
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    first = 1 + next(i for i, line in enumerate(lines) if line.strip() == "load_relations(tmp_path)")
    assert [(one.filename, one.lineno) for one in caught] == [(__file__, first), (__file__, first + 1)]
    assert all("cut off.json" in str(one.message) for one in caught)
