"""An ensemble on disk: one JSON file that a person can read, with a line per edge that was kept at least once.

A line holds the edge's name, its inclusion probability, its score, and which draws and twins kept it, as hexadecimal
numbers whose highest bit is the first draw: `{"edge": "input->m0", "pi": 0.75, "kept": "d", ...}` of four draws.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kcwb.errors import CircuitError
from kcwb.files import write_text
from kcwb.models.graph import Graph

if TYPE_CHECKING:
    from kcwb.circuits.ensemble import Ensemble

_FORMAT = "kcwb-ensemble/1"
_OURS = re.compile(rb'"format"\s*:\s*"kcwb-ensemble/')
_DIGITS = re.compile("[0-9a-f]*")
_MOST_DRAWS = 10**6


def save_ensemble(ensemble: Ensemble, path: Path, force: bool) -> None:
    """Write an ensemble; see `Ensemble.save`."""
    graph = {name: getattr(ensemble.graph, name) for name in ("n_layers", "n_heads", "parallel")}
    parts = [_part(one) for one in (ensemble, *ensemble.halves)]
    head = {"format": _FORMAT, "graph": graph, "digest": _digest(graph, parts)}
    head["provenance"] = dict(ensemble.provenance)
    text = json.dumps(head, ensure_ascii=False, indent=2)[:-2] + ',\n  "parts": [\n'
    text += ",\n".join(map(_written, parts)) + "\n  ]\n}\n"
    try:
        if not (force or not path.exists() or is_ours(path)):
            raise CircuitError(
                f"{path} is there and is no ensemble, so it is left as it is. Choose another name, or save(..., "
                "force=True)."
            )
        write_text(path, text)
    except OSError as error:
        words = f"The ensemble cannot be saved as {path}: {error.strerror}. Choose another place."
        raise CircuitError(words) from error


def load_ensemble(path: Path) -> Ensemble:
    """Read an ensemble; see `Ensemble.load`."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CircuitError(f"The ensemble {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is not an ensemble: {error}. Was its writing cut off?") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise CircuitError(f"{path} is not an ensemble of this workbench: its format is not {_FORMAT!r}.")
    try:
        if data["digest"] != _digest(data["graph"], data["parts"]):
            raise CircuitError("it does not match its digest; was it edited by hand?")
        graph, provenance = Graph.of_file(**data["graph"]), dict(data["provenance"])
        whole, *halves = data["parts"]
        return _ensemble(graph, whole, provenance, tuple(_ensemble(graph, one, provenance, ()) for one in halves))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, CircuitError) as error:
        raise CircuitError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def is_ours(path: Path) -> bool:
    """Whether a file is an ensemble's, also one that was cut off."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _OURS.search(file.read(2**20)) is not None


def _digest(graph: Any, parts: Any) -> str:
    """SHA-256 of the graph's sizes and all edges and draws."""
    return hashlib.sha256(json.dumps([graph, parts], sort_keys=True).encode()).hexdigest()


def _part(ensemble: Ensemble) -> dict[str, Any]:
    """The draws of an ensemble, or of one of its halves, ready for JSON."""
    kept, twins = _hexadecimal(ensemble.kept), {name: _hexadecimal(one) for name, one in ensemble.twins.items()}
    shares, scores = ensemble.kept.double().mean(0).tolist(), ensemble.scores.double().tolist()
    edges = []
    for i, (row, column) in enumerate(ensemble.places.tolist()):
        line = {"edge": ensemble.graph.edge_name(row, column), "pi": round(shares[i], 6)}
        line |= {"score": None if math.isnan(scores[i]) else scores[i], "kept": kept[i]}
        edges.append(line | {name: bits[i] for name, bits in twins.items()})
    twin_draws = {name: len(one) for name, one in ensemble.twins.items()}
    return {"draws": len(ensemble), "twins": twin_draws, "edges": edges}


def _written(one: dict[str, Any]) -> str:
    lines = ",\n      ".join(json.dumps(edge, ensure_ascii=False) for edge in one["edges"])
    head = json.dumps({"draws": one["draws"], "twins": one["twins"]}, ensure_ascii=False)[:-1]
    return f'    {head}, "edges": [\n      {lines}\n    ]}}'


def _ensemble(graph: Graph, one: dict[str, Any], provenance: dict[str, Any], halves: tuple[Ensemble, ...]) -> Ensemble:
    from kcwb.circuits.ensemble import Ensemble

    draws, edges = one["draws"], one["edges"]
    places = torch.tensor([graph.edge_index(edge["edge"]) for edge in edges], dtype=torch.long).reshape(-1, 2)
    scores = torch.tensor([math.nan if edge["score"] is None else edge["score"] for edge in edges])
    kept = _bits([edge["kept"] for edge in edges], draws)
    twins = {name: _bits([edge[name] for edge in edges], n) for name, n in one["twins"].items()}
    return Ensemble(graph, places, kept, twins, scores.float(), provenance, halves)


def _hexadecimal(kept: Tensor) -> list[str]:
    """Each column of `[K, M]` as a hexadecimal number, the first draw its highest bit."""
    width = -(-len(kept) // 4)
    rows = ("".join("1" if one else "0" for one in column) for column in kept.T.tolist())
    return [f"{int(row, 2) << (4 * width - len(row)):0{width}x}" for row in rows] if len(kept) else [""] * kept.shape[1]


def _bits(rows: list[str], draws: int) -> Tensor:
    if type(draws) is not int or not 0 <= draws <= _MOST_DRAWS:
        raise CircuitError(f"{draws!r:.60} is no number of draws.")
    width = -(-draws // 4)
    if any(len(row) != width or not _DIGITS.fullmatch(row) for row in rows):  # int() takes signs and spaces, too
        raise CircuitError(f"an edge's draws are not {width} hexadecimal digits.")
    found = [[bit == "1" for bit in f"{int(row or '0', 16):0{4 * width}b}"[:draws]] for row in rows]
    return torch.tensor(found, dtype=torch.bool).reshape(len(rows), draws).T.contiguous()
