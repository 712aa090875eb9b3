"""A circuit on disk: a JSON file that a person can read, and the scores of all edges in a safetensors file beside it.

The JSON holds its graph, its provenance, and a line per kept edge, named as in MIB (`input->a0.h0<q>`).
The scores' file is named after the JSON file and its own content, so that a circuit never meets another one's:

1. `save` writes the scores under their own name, then replaces the JSON, then removes the scores of the JSON that was
   there. So whenever it is killed there is a whole circuit, the old one or the new one.
2. `load` that finds no scores looks whether the JSON is still the one that it has read. If not, a writer was quicker,
   and it reads again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kcwb.circuits.session import session_json, with_session_of_json
from kcwb.errors import CircuitError
from kcwb.files import held, write_tensors, write_text
from kcwb.models.graph import Graph
from kcwb.outputs import CIRCUIT, Kind

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit

_FORMAT = "kcwb-circuit/1"
_DIGEST = re.compile("[0-9a-f]{64}")
#: What a file raises that is damaged.
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, CircuitError)


def read_bytes(path: Path, noun: str = "circuit") -> bytes:
    """The content of a file that holds a circuit, or another noun; CircuitError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CircuitError(f"The {noun} {path} cannot be read: {error.strerror}.") from error


def read_ours(path: Path, kind: Kind, version: str) -> dict[str, Any]:
    """What a JSON file of ours holds; CircuitError if it cannot be read, or is none of that kind and version."""
    content = read_bytes(path, kind.noun)
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is not {kind.name}: {error}. Was its writing cut off?") from error
    if not isinstance(data, dict) or data.get("format") != version:
        raise CircuitError(f"{path} is not {kind.name} of this workbench: its format is not {version!r}.")
    return data


@contextlib.contextmanager
def saving(path: Path, kind: Kind, force: bool) -> Iterator[None]:
    """Have a file written that replaces none of another kind, unless forced; CircuitError if it cannot be."""
    try:
        if path.exists() and not (force or (path.is_file() and kind.ours(path))):
            raise CircuitError(
                f"{path} is there and is no {kind.noun}, so it is left as it is. Choose another name, or save(..., "
                "force=True)."
            )
        yield
    except OSError as error:
        words = f"The {kind.noun} cannot be saved as {path}: {error.strerror}. Choose another place."
        raise CircuitError(words) from error


def save_circuit(circuit: Circuit, path: Path, force: bool) -> None:
    """Write a circuit; see `Circuit.save`."""
    text, stored = _json(circuit)
    with saving(path, CIRCUIT, force):
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.parent):
            if circuit.scores is not None and stored is not None:
                write_tensors(_scores_path(path, stored), {"scores": circuit.scores})
            write_text(path, text)
            _remove_scores(path, stored)


def load_circuit(path: Path) -> Circuit:
    """Read a circuit; see `Circuit.load`."""
    circuit, session = _load(path)
    return circuit if session is None else with_session_of_json(circuit, session, path)


def _load(path: Path) -> tuple[Circuit, Any]:
    """The circuit, and the session of its file as it stands there."""
    while True:
        version = _version(path)
        data = read_ours(path, CIRCUIT, _FORMAT)
        try:
            circuit = _of_json(data)
            stored = data["scores"]
            if stored is None:
                return replace(circuit, scores=None), data.get("session")
            if not _DIGEST.fullmatch(stored):
                raise CircuitError("the digest of its scores is none.")
            scores = _read_scores(path, stored)
            if scores is not None:
                return replace(circuit, scores=scores), data.get("session")
        except DAMAGE as error:
            raise CircuitError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if _version(path) in (version, None):
            return circuit, data.get("session")


def edges_digest(graph: Graph, names: list[str]) -> str:
    """SHA-256 of a graph's sizes and the names of some of its edges."""
    return hashlib.sha256("\n".join([str(graph), *names]).encode()).hexdigest()


def _json(circuit: Circuit) -> tuple[str, str | None]:
    """The JSON file's text, and the digest of the scores."""
    frame = circuit.edges
    names, scores = frame["sender"] + "->" + frame["receiver"], frame["score"]
    edges = [
        {"edge": name, "score": None if math.isnan(score) else score}
        for name, score in zip(names, scores.tolist(), strict=True)
    ]
    stored = None if circuit.scores is None else _scores_digest(circuit.scores)
    head = {"format": _FORMAT, "graph": asdict(circuit.graph), "digest": circuit.digest, "scores": stored}
    head["provenance"] = dict(circuit.provenance)
    if circuit.session is not None:
        head["session"] = session_json(circuit.session)
    lines = ",\n    ".join(json.dumps(edge, ensure_ascii=False) for edge in edges)
    return json.dumps(head, ensure_ascii=False, indent=2)[:-2] + f',\n  "edges": [\n    {lines}\n  ]\n}}\n', stored


def _of_json(data: dict[str, Any]) -> Circuit:
    """The circuit that a JSON file holds, with the scores of its kept edges."""
    from kcwb.circuits.circuit import Circuit

    graph = Graph.of_file(**data["graph"])
    edges = {e["edge"]: math.nan if e["score"] is None else float(e["score"]) for e in data["edges"]}
    names = [e["edge"] for e in data["edges"]]
    if not all(isinstance(name, str) for name in names) or edges_digest(graph, sorted(names)) != data["digest"]:
        raise CircuitError("its graph or edges do not match their digest; was it edited by hand?")
    return Circuit.from_edges(graph, edges, provenance=dict(data["provenance"]))


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever a file is replaced; None if it is not there."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


# --- scores ---


def _stem(path: Path) -> str:
    """What the names of a circuit's scores begin with; `tau` and `tau.json` may lie side by side."""
    return path.name.removesuffix(".json") if path.suffix == ".json" else f"{path.name}."


def _scores_path(path: Path, digest: str) -> Path:
    return path.with_name(f"{_stem(path)}.{digest[:12]}.scores.safetensors")


def _scores_digest(scores: Tensor) -> str:
    return hashlib.sha256(scores.contiguous().numpy().tobytes()).hexdigest()


def _remove_scores(path: Path, stored: str | None) -> None:
    """Remove what an older circuit of exactly this name left, but for the scores that are stored now."""
    old = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{12}\.scores\.safetensors")
    now = None if stored is None else _scores_path(path, stored).name
    with contextlib.suppress(OSError):  # the new circuit is there, whole
        for one in path.parent.iterdir():
            if one.name != now and old.fullmatch(one.name):
                one.unlink(missing_ok=True)


def _read_scores(path: Path, digest: str) -> Tensor | None:
    """The scores of all edges; None if their file is not there."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = _scores_path(path, digest)
    if not file.is_file() and path.suffix != ".json":
        file = path.with_name(f"{path.name}.{digest[:12]}.scores.safetensors")  # as they were named before
    advice = "Without it the circuit loads with fewer scores."
    try:
        scores = load(file.read_bytes())["scores"]  # by its name torch opens it again, when it may be gone
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError) as error:
        raise CircuitError(f"{file} is damaged: {error}. {advice}") from error
    if _scores_digest(scores) != digest:
        raise CircuitError(f"{file} is damaged: its digest differs. {advice}")
    return scores
