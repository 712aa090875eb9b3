"""An ensemble on disk: one JSON file that a person can read, with a line per edge that was kept at least once.

A line holds the edge's name, its inclusion probability, its score, and which draws and twins kept it, as hexadecimal
numbers whose highest bit is the first draw: `{"edge": "input->m0", "pi": 0.75, "kept": "d", ...}` of four draws.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kcwb.circuits.circuitfile import DAMAGE, read_ours, saving
from kcwb.errors import CircuitError
from kcwb.files import write_text
from kcwb.models.graph import Graph
from kcwb.outputs import ENSEMBLE

if TYPE_CHECKING:
    from kcwb.circuits.ensemble import Ensemble

_FORMAT = "kcwb-ensemble/1"
_DIGITS = re.compile("[0-9a-f]*")
_MOST_DRAWS = 10**6


def save_ensemble(ensemble: Ensemble, path: Path, force: bool) -> None:
    """Write an ensemble; see `Ensemble.save`."""
    graph = asdict(ensemble.graph)
    parts = [_part(one) for one in (ensemble, *ensemble.halves)]
    head = {"format": _FORMAT, "graph": graph, "digest": _digest(graph, parts)}
    head["provenance"] = dict(ensemble.provenance)
    text = json.dumps(head, ensure_ascii=False, indent=2)[:-2] + ',\n  "parts": [\n'
    text += ",\n".join(map(_written, parts)) + "\n  ]\n}\n"
    with saving(path, ENSEMBLE, force):
        write_text(path, text)


def load_ensemble(path: Path) -> Ensemble:
    """Read an ensemble; see `Ensemble.load`."""
    data = read_ours(path, ENSEMBLE, _FORMAT)
    try:
        if data["digest"] != _digest(data["graph"], data["parts"]):
            raise CircuitError("it does not match its digest; was it edited by hand?")
        graph, provenance = Graph.of_file(**data["graph"]), dict(data["provenance"])
        whole, *halves = data["parts"]
        return _ensemble(graph, whole, provenance, tuple(_ensemble(graph, one, provenance, ()) for one in halves))
    except DAMAGE as error:
        raise CircuitError(f"{path} is damaged: {type(error).__name__}: {error}") from error


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
    return [row.tobytes().hex()[:width] for row in np.packbits(kept.T.numpy(), axis=1)]


def _bits(rows: list[str], draws: int) -> Tensor:
    if type(draws) is not int or not 0 <= draws <= _MOST_DRAWS:
        raise CircuitError(f"{draws!r:.60} is no number of draws.")
    width = -(-draws // 4)
    if any(len(row) != width or not _DIGITS.fullmatch(row) for row in rows):  # fromhex() takes capitals and spaces, too
        raise CircuitError(f"an edge's draws are not {width} hexadecimal digits.")
    packed = np.array([[*bytes.fromhex(row + "0" * (width % 2))] for row in rows], np.uint8)
    packed = packed.reshape(len(rows), -(-width // 2))
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=draws).astype(bool)).T.contiguous()
