"""A circuit in any kind of file: of ours, of MIB, of Knowledge Circuits; which kind it is, its content says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.circuitfile import read_bytes
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.interchange import PICKLES, load_gv, load_mib
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from kcwb.verbs import verb

FileKind = Literal["circuit", "ensemble", "mib", "gv"]

_DRAWING = re.compile(rb"\s*(strict\s+)?digraph\b")


@verb
def read_any(path: str | Path, graph: Graph | None = None) -> Circuit | Ensemble:
    """Read a circuit or an ensemble from a file of any kind that is known here.

    Parameters
    ----------
    path
        A file of `Circuit.save` or `Ensemble.save`, MIB's JSON (`kcwb.circuits.load_mib`), or a graphviz file of
        Knowledge Circuits (`kcwb.circuits.load_gv`). Its name does not matter.
    graph
        The model's graph, which a graphviz file does not say.

    Raises
    ------
    CircuitError
        If the file is missing, damaged or of no such kind, or is a graphviz file and there is no graph.
    """
    kind, path = file_kind(path), Path(path)
    if kind == "circuit":
        return Circuit.load(path)
    if kind == "ensemble":
        return Ensemble.load(path)
    if kind == "mib":
        return load_mib(path)
    if graph is None:
        raise CircuitError(f"{path} is a graphviz file, which does not say its model's size. Give the model's graph.")
    return load_gv(path, graph)


@verb
def file_kind(path: str | Path) -> FileKind:
    """Which kind of file holds a circuit; CircuitError if it is none of those that `read_any` reads."""
    path = Path(path)
    content = read_bytes(path)
    if _DRAWING.match(content):
        return "gv"
    if content.startswith(PICKLES):
        return "mib"  # whose reader says why it reads no pickle
    known = "a circuit or an ensemble of kcwb, MIB's JSON, or a graphviz file of Knowledge Circuits"
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is not {known}: {error}.") from error
    if isinstance(data, dict):
        for kind in ("circuit", "ensemble"):
            if str(data.get("format")).startswith(f"kcwb-{kind}/"):
                return kind
        if "cfg" in data:
            return "mib"
    raise CircuitError(f"{path} is JSON, but not {known}: it has neither their 'format' nor MIB's 'cfg'.")
