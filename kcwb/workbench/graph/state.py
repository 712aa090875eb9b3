"""What a person can do to a drawn circuit, by the names of the widget's traits, and what of it is refused.

A circuit of None is one that is not there yet: then nothing can be selected, cut or grouped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.session import check_edges, check_nodes, one_group_each
from kcwb.errors import CircuitError, SettingError, shown
from kcwb.settings import Kind, NotNegative, fits, words

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


def _groups(name: str, value: Any, circuit: Circuit | None) -> dict[str, list[str]]:
    groups = {group: _nodes(f"{name}[{shown(group)}]", nodes, circuit) for group, nodes in _named(name, value).items()}
    for group, nodes in groups.items():
        if not group or not nodes:
            raise SettingError(f"{name}: {shown(group)} has no name or no nodes.")
    one_group_each(name, groups)
    return groups


def _words(name: str, value: Any, circuit: Circuit | None) -> dict[str, str]:
    most = _NAME if name == "names" else _TEXT
    said = _named(name, value)
    _nodes(name, list(said), circuit)
    for node, text in said.items():
        if not fits(text, str) or len(text) > most:
            raise SettingError(f"{name}[{node!r}]={shown(text)} is not text of at most {most:,} letters.")
    return said


def _paths(name: str, value: Any, circuit: Circuit | None) -> list[list[str]]:
    if not fits(value, Sequence) or len(value) > _ITEMS:
        raise SettingError(f"{name}={shown(value)} is not a list of paths, each a list of nodes.")
    return [_nodes(name, path, circuit) for path in value]


def _number(name: str, value: Any, circuit: Circuit | None, kind: Any) -> float:
    if not fits(value, kind):
        raise SettingError(f"{name}={shown(value)} is not {words(kind)}.")
    return float(value)


def _answers(name: str, value: Any, circuit: Circuit | None) -> dict[str, Any]:
    wanted = "{'facts': [{'prompt', 'answer', 'before': {'p', 'rank', 'top'}, 'after'}], 'loss_before', 'loss_after'}"
    given = _json(value)
    if not (
        _has(given, {"facts?": [_FACT], "own?": _OWN})
        and all(map(_is_asked, given.get("facts", [])))
        and ("own" not in given or "problem" in given["own"] or (_has(given["own"], _FACT) and _is_asked(given["own"])))
        and all(fits(number, float) for key, number in given.items() if key not in ("facts", "own"))
    ):
        raise SettingError(f"{name}={shown(value)} is not {wanted} with finite numbers.")
    return given


def _is_asked(fact: Mapping[str, Any]) -> bool:
    return any(run in fact for run in ("before", "after", "model"))


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
    given = _json(value)
    if given != {} and not (
        _has(given, {"runs": [{"run": str, "prompts": [_READ]}]})
        and all(run["prompts"] and all(map(_adds_up, run["prompts"])) for run in given["runs"])
    ):
        raise SettingError(f"{name}={shown(value)} is not {{'node', 'runs': [{{'run', 'prompts': read_node(...)}}]}}.")
    if given:
        _nodes(f"{name}['node']", [given.get("node")], circuit)
    return given


def _adds_up(read: Mapping[str, Any]) -> bool:
    """Whether each token has its attention, and each head of a layer a lower triangle of as many rows as tokens."""
    layer = read.get("layer", {"tokens": [], "heads": []})
    cells = len(layer["tokens"]) * (len(layer["tokens"]) + 1) // 2
    apart = len(read.get("tokens", [])) != len(read.get("attention", []))
    return not apart and all(len(head) == cells for head in layer["heads"])


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


# --- shapes ---

_CONFIDENCE = Annotated[float, Kind("a number from 0 to 1", lambda value: fits(value, float) and 0 <= value <= 1)]
#: JSON that a trait holds: keys, those with ? may be missing; lists of any length; pairs; annotations.
_PAIRS = [(str, float)]
_RUN = {"p": float, "rank": int, "top?": _PAIRS}
_FACT = {"prompt": str, "answer": str, "before?": _RUN, "after?": _RUN, "model?": _RUN}
_OWN = {f"{key}?": str for key in ("prompt", "subject", "answer", "delivers", "problem")}  # a fact, or what is wrong
_READ = {
    "prompt": str, "answer": str, "writes?": _PAIRS, "query?": _PAIRS, "key?": _PAIRS, "tokens?": [str],
    "attention?": [float], "at?": int, "layer?": {"number": int, "tokens": [str], "heads": [[int]]},
}  # fmt: skip


def _json(value: Any) -> Any:
    """A value as JSON gives it back; None where it cannot hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


def _has(value: Any, shape: Any) -> bool:
    """Whether JSON has a shape."""
    if isinstance(shape, dict):
        known = {key.removesuffix("?"): (one, key.endswith("?")) for key, one in shape.items()}
        return isinstance(value, dict) and all(
            _has(value[key], one) if key in value else optional for key, (one, optional) in known.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has(one, shape[0]) for one in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_has, value, shape))
    return fits(value, shape)


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


CHECKS: Mapping[str, Callable[[str, Any, Circuit | None], Any]] = {
    "selected": _nodes, "selected_edges": _edges, "pinned": _nodes, "cut": partial(_edges, kept=True),
    "forced": partial(_edges, kept=False), "groups": _groups, "names": _words, "notes": _words,
    "threshold": partial(_number, kind=NotNegative), "confidence": partial(_number, kind=_CONFIDENCE),
    "answers": _answers, "question": _question, "reading": _reading, "paths": _paths, "asked": _asked, "view": _view,
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


def is_blank(value: Any) -> bool:
    """Whether a trait says nothing, as at first."""
    return value in ([], {}, "", False) or (isinstance(value, float) and (value == 0 or math.isnan(value)))
