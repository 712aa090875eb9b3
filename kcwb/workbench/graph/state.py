"""What a person can do to a drawn circuit, by the names of the widget's traits, and what of it is refused.

A circuit of None is one that is not there yet: then nothing can be selected, cut or grouped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.session import check_edges, check_nodes, one_group_each
from kcwb.errors import CircuitError, SettingError, shown
from kcwb.settings import fits

_ITEMS, _NAME, _TEXT = 100_000, 120, 4000  # of a list; letters of a name, of a text


def checked(name: str, value: Any, circuit: Circuit | None) -> Any:
    """The value as it is kept: edges by their full names, none twice.

    Raises
    ------
    SettingError, CircuitError
        In one line, if it is not what the trait holds, or names what the circuit has not.
    """
    return CHECKS[name](name, value, circuit)


def _nodes(name: str, value: Any, circuit: Circuit | None) -> list[str]:
    nodes = list(dict.fromkeys(_texts(name, value)))
    if nodes:
        check_nodes(name, nodes, _there(name, nodes[0], circuit).graph)
    return nodes


def _edges(name: str, value: Any, circuit: Circuit | None, kept: bool | None = None) -> list[str]:
    edges = _texts(name, value)
    return check_edges(name, edges, _there(name, edges[0], circuit), kept) if edges else []


def _cut(name: str, value: Any, circuit: Circuit | None) -> list[str]:
    return _edges(name, value, circuit, kept=True)


def _forced(name: str, value: Any, circuit: Circuit | None) -> list[str]:
    return _edges(name, value, circuit, kept=False)


def _groups(name: str, value: Any, circuit: Circuit | None) -> dict[str, list[str]]:
    groups = {group: _nodes(f"{name}[{shown(group)}]", nodes, circuit) for group, nodes in _named(name, value).items()}
    for group, nodes in groups.items():
        if not group or not nodes:
            raise SettingError(f"{name}: {shown(group)} has no name or no nodes.")
    one_group_each(name, groups)
    return groups


def _words(name: str, value: Any, circuit: Circuit | None) -> dict[str, str]:
    most = _NAME if name == "names" else _TEXT
    words = _named(name, value)
    _nodes(name, list(words), circuit)
    for node, text in words.items():
        if not fits(text, str) or len(text) > most:
            raise SettingError(f"{name}[{node!r}]={shown(text)} is not text of at most {most:,} letters.")
    return words


def _paths(name: str, value: Any, circuit: Circuit | None) -> list[list[str]]:
    if not fits(value, Sequence) or len(value) > _ITEMS:
        raise SettingError(f"{name}={shown(value)} is not a list of paths, each a list of nodes.")
    return [_nodes(name, path, circuit) for path in value]


def _threshold(name: str, value: Any, circuit: Circuit | None) -> float:
    if not fits(value, float) or value < 0:
        raise SettingError(f"{name}={shown(value)} is not a number of at least 0.")
    return float(value)


def _confidence(name: str, value: Any, circuit: Circuit | None) -> float:
    if not fits(value, float) or not 0 <= value <= 1:
        raise SettingError(f"{name}={shown(value)} is not a number from 0 to 1.")
    return float(value)


def _answers(name: str, value: Any, circuit: Circuit | None) -> dict[str, Any]:
    wanted = "{'facts': [{'prompt', 'answer', 'before': {'p', 'rank', 'top'}, 'after'}], 'loss_before', 'loss_after'}"
    try:
        given = json.loads(json.dumps(value, allow_nan=False))
        facts = given.get("facts", [])
        good = isinstance(facts, list) and all(_is_fact(fact) for fact in facts)
        good &= all(fits(number, float) for key, number in given.items() if key not in ("facts", "own"))
        good &= "own" not in given or _is_own(given["own"])
    except (TypeError, ValueError, AttributeError, RecursionError):
        good = False
    if not good:
        raise SettingError(f"{name}={shown(value)} is not {wanted} with finite numbers.")
    return given


def _is_fact(fact: Any) -> bool:
    runs = [fact[run] for run in ("before", "after", "model") if run in fact]
    return (
        all(fits(fact.get(key), str) for key in ("prompt", "answer"))
        and len(runs) > 0
        and all(
            fits(run["p"], float) and fits(run["rank"], int) and isinstance(run.get("top", []), list) for run in runs
        )
        and all(fits(top[0], str) and fits(top[1], float) for run in runs for top in run.get("top", []))
    )


def _is_own(own: Any) -> bool:
    """A fact, or what is wrong with it; and what cut edges deliver."""
    said = all(fits(own.get(key, ""), str) for key in ("prompt", "subject", "answer", "delivers", "problem"))
    return said and ("problem" in own or _is_fact(own))


def _question(name: str, value: Any, circuit: Circuit | None) -> dict[str, str]:
    asked = _named(name, value)
    for key, text in asked.items():
        if key not in ("prompt", "subject", "answer") or not fits(text, str):
            raise SettingError(f"{name}={shown(value)} is not {{'prompt', 'subject', 'answer'}} with a text for each.")
        if len(text) > _TEXT:
            raise SettingError(f"{name}: the {key} has {len(text):,} letters; at most {_TEXT:,} are asked.")
    if asked and "prompt" not in asked:
        raise SettingError(f"{name}={shown(value)} has no prompt.")
    return asked


def _reading(name: str, value: Any, circuit: Circuit | None) -> dict[str, Any]:
    try:
        given = json.loads(json.dumps(value, allow_nan=False))
        runs = given["runs"] if given else []
        good = isinstance(runs, list) and all(
            fits(run["run"], str) and run["prompts"] and all(_is_read(one) for one in run["prompts"]) for run in runs
        )
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        good = False
    if not good:
        raise SettingError(f"{name}={shown(value)} is not {{'node', 'runs': [{{'run', 'prompts': read_node(...)}}]}}.")
    if given:
        _nodes(f"{name}['node']", [given.get("node")], circuit)
    return given


def _is_read(one: Any) -> bool:
    pairs = [pair for part in ("writes", "query", "key") for pair in one.get(part, [])]
    tokens, attention = one.get("tokens", []), one.get("attention", [])
    return (
        fits(one["prompt"], str)
        and fits(one["answer"], str)
        and all(fits(text, str) and fits(number, float) for text, number in pairs)
        and fits(tokens, list[str])
        and fits(attention, list[float])
        and len(tokens) == len(attention)
        and fits(one.get("at", 0), int)
        and ("layer" not in one or _is_layer(one["layer"]))
    )


def _is_layer(layer: Any) -> bool:
    """The patterns of all heads of a layer: the lower triangles of as many rows as there are tokens."""
    tokens, heads = layer["tokens"], layer["heads"]
    return (
        fits(layer["number"], int)
        and fits(tokens, list[str])
        and fits(heads, list[list[int]])
        and all(len(head) == len(tokens) * (len(tokens) + 1) // 2 for head in heads)
    )


def _view(name: str, value: Any, circuit: Circuit | None) -> dict[str, Any]:
    numbers = {"width": 1, "height": 1, "scale": 1e-3, "stretch": 1e-3, "left": -math.inf, "top": -math.inf}
    kinds = dict.fromkeys(numbers, float) | {"hidden": list[str], "open": list[str]}
    kinds |= dict.fromkeys(("pinned_only", "layered", "dark"), bool)
    good = fits(value, dict) and all(key in kinds and fits(one, kinds[key]) for key, one in value.items())
    if not good or not all(least <= value.get(key, 1) <= 1e6 for key, least in numbers.items()):
        raise SettingError(f"{name}={shown(value)} is not what is looked at: {', '.join(kinds)}.")
    return dict(value)


def _asked(name: str, value: Any, circuit: Circuit | None) -> str:
    if value not in ("", "undo", "redo", "explain"):
        raise SettingError(f"{name}={shown(value)} is none of undo, redo, explain.")
    return value


CHECKS: Mapping[str, Callable[[str, Any, Circuit | None], Any]] = {
    "selected": _nodes, "selected_edges": _edges, "pinned": _nodes, "cut": _cut, "forced": _forced, "groups": _groups,
    "names": _words, "notes": _words, "threshold": _threshold, "confidence": _confidence, "answers": _answers,
    "question": _question, "reading": _reading, "paths": _paths, "asked": _asked, "view": _view,
}  # fmt: skip
"""Trait -> its check."""


def kept_of(values: Mapping[str, Any], circuit: Circuit) -> dict[str, Any]:
    """What of a person's doings can be said of another circuit: names and groups of its nodes, edges that it has."""
    found: dict[str, Any] = {}
    for name in ("pinned", "cut", "forced"):
        found[name] = [one for one in values[name] if _fits(name, [one], circuit)]
    for name in ("names", "notes"):
        found[name] = {node: text for node, text in values[name].items() if _fits(name, {node: text}, circuit)}
    found["groups"] = {
        group: members
        for group, nodes in values["groups"].items()
        if (members := [node for node in nodes if _fits("pinned", [node], circuit)])
    }
    return found


def _fits(name: str, value: Any, circuit: Circuit) -> bool:
    try:
        checked(name, value, circuit)
    except (CircuitError, SettingError):
        return False
    return True


# --- shapes ---


def _texts(name: str, value: Any) -> list[str]:
    if not fits(value, list[str]) or len(value) > _ITEMS or not all(fits(one, str) for one in value):
        raise SettingError(f"{name}={shown(value)} is not a list of names.")
    return value


def _named(name: str, value: Any) -> dict[str, Any]:
    if not fits(value, dict) or len(value) > _ITEMS or not all(fits(key, str) and len(key) <= _NAME for key in value):
        raise SettingError(f"{name}={shown(value)} is not a table by names of at most {_NAME} letters.")
    return dict(value)


def _there(name: str, one: str, circuit: Circuit | None) -> Circuit:
    if circuit is None:
        raise CircuitError(f"{name}: there is no circuit yet, so it has no {shown(one)}.")
    return circuit


def is_blank(value: Any) -> bool:
    """Whether a trait says nothing, as at first."""
    return value in ([], {}, "", False) or (isinstance(value, float) and (value == 0 or math.isnan(value)))
