"""Circuits of other tools: read and write MIB's JSON, read the graphviz files of Knowledge Circuits.

**MIB** (arXiv 2504.13151) exchanges the JSON that EAP-IG's `Graph.to_json` writes (github.com/hannamw/EAP-IG), with
the names that this package uses:

    {"cfg": {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": false, "d_model": 768},
     "nodes": {"input": {"in_graph": true}, ...},
     "edges": {"input->a0.h0<q>": {"score": 0.25, "in_graph": true}, ...}}

Read are also the older form (nodes as plain booleans, a score of null, no `d_model`) and edges as plain numbers
(scores) or booleans (`in_graph`). A file that gives scores alone ranks edges: all that it lists are kept, and
`kcwb.resize` chooses among them. EAP-IG's `.pt` files are pickles, which can run code when they are read: they are
refused.

**Knowledge Circuits** (arXiv 2405.17969, github.com/zjunlp/KnowledgeCircuits) released circuits as drawings, written
by the `show` of ACDC's code, with lines such as `"<a14.7>" -> "<m15>"`, `embed -> "<m0>"` and
`"<m15>" -> "<resid_post>"`. See `load_gv` for what they do not say.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.circuitfile import read_bytes, saving
from kcwb.circuits.provenance import part
from kcwb.errors import CircuitError
from kcwb.files import write_text
from kcwb.models.graph import Graph
from kcwb.outputs import Kind
from kcwb.settings import Count
from kcwb.verbs import verb

PICKLES = (b"PK", b"\x80")
"""How a PyTorch file and a pickle begin."""


_OURS = re.compile(rb'{"cfg": {.*}, "provenance": {', re.DOTALL)
_MIB = Kind("a circuit of MIB's form that kcwb wrote", lambda path: _OURS.match(path.read_bytes()) is not None)


def to_mib(circuit: Circuit, *, d_model: int | None = None) -> dict[str, Any]:
    """A circuit in MIB's form, ready for JSON.

    Parameters
    ----------
    circuit
        What to convert. Every edge of its graph is listed. What EAP-IG's form has no place for is added where it does
        not look and `from_mib` does: `"scored": false` at an edge without a score (whose score is then EAP-IG's
        default, 0), and the provenance.
    d_model
        The width of the model's residual stream, `model.network.d_model`: later versions of EAP-IG do not read a file
        without it. None: as in the circuit's provenance, else left out.

    Returns
    -------
    dict
        `cfg`, `nodes`, `edges` and `provenance`. A node is in the graph if one of its edges is.
    """
    graph, scores = circuit.graph, circuit.scores
    cfg: dict[str, Any] = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel}
    for source in ("cfg", "model"):
        d_model = d_model if d_model is not None else part(circuit.provenance, source).get("d_model")
    if d_model is not None:
        cfg["d_model"] = d_model
    rows, columns = graph.exists.nonzero(as_tuple=True)
    values = [math.nan] * len(rows) if scores is None else scores[rows, columns].tolist()
    edges: dict[str, dict[str, Any]] = {}
    kept = circuit.kept[rows, columns].tolist()
    for place, keeps, score in zip(graph.exists.nonzero().tolist(), kept, values, strict=True):
        edge: dict[str, Any] = {"score": score, "in_graph": keeps}
        edges[graph.edge_name(*place)] = {**edge, "score": 0.0, "scored": False} if math.isnan(score) else edge
    nodes = {name: {"in_graph": used} for name, used in zip(graph.node_names, circuit.touched.tolist(), strict=True)}
    return {"cfg": cfg, "nodes": nodes, "edges": edges, "provenance": dict(circuit.provenance)}


def from_mib(data: Any, *, where: str = "The circuit") -> Circuit:
    """Read a circuit in MIB's form, of any version of EAP-IG, from what `json.loads` gives of the file `where`.

    It is on the graph that `cfg` describes. Edges that are not listed are cut, and scores are NaN where there are none;
    `in_graph` of nodes is not read, since it follows from the edges. CircuitError, which says the part, if one is
    missing or malformed, an edge does not exist in such a graph, or the circuit is one of nodes or of neurons.
    """
    if not isinstance(data, Mapping) or "cfg" not in data:
        raise CircuitError(f"{where} is not a circuit of MIB: it has no 'cfg' with the model's size.")
    sizes = _mapping(data["cfg"])
    try:
        graph = Graph.of_file(*(sizes.get(key) for key in ("n_layers", "n_heads", "parallel_attn_mlp")))
    except CircuitError as error:
        raise CircuitError(f"{where}, cfg, {error}") from error
    _check_nodes(data.get("nodes", {}), graph, where)
    if "edges" not in data:
        raise CircuitError(f"{where} has no 'edges': a circuit of nodes alone does not say which edges are kept.")
    listed = data["edges"]
    if not isinstance(listed, Mapping):
        raise CircuitError(f"{where}, edges: expected an object of edges by name, found {listed!r:.60}.")
    edges = {name: _edge(value, f"{where}, edges, {name!r:.60}") for name, value in listed.items()}
    silent = [name for name, (_, said) in edges.items() if said is None]
    if 0 < len(silent) < len(edges):
        raise CircuitError(
            f"{where}, edges, {silent[0]!r:.60}: other edges say whether they are in_graph, this one not."
        )
    kept = torch.zeros_like(graph.exists)
    scores = torch.full(kept.shape, math.nan)
    for name, (score, said) in edges.items():
        try:
            index = graph.edge_index(name)
        except CircuitError as error:
            raise CircuitError(f"{where}, edges: {error}") from None
        kept[index], scores[index] = said is not False, score
    provenance = data.get("provenance") or {"method": "imported", "format": "MIB", "cfg": dict(data["cfg"])}
    if not isinstance(provenance, Mapping):
        raise CircuitError(f"{where}, provenance: expected an object, found {provenance!r:.60}.")
    return Circuit(graph, kept, None if bool(scores.isnan().all()) else scores, dict(provenance))


@verb
def save_mib(circuit: Circuit, path: str | Path, *, d_model: Count | None = None, force: bool = False) -> None:
    """Write a circuit as MIB's JSON; parameters as in `to_mib`. `force`: over any file, not only one of this function.

    Raises
    ------
    CircuitError
        If the circuit cannot be written as JSON, or the file cannot or must not be written.
    """
    try:
        text = json.dumps(to_mib(circuit, d_model=d_model), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CircuitError(
            f"The circuit cannot be written as JSON: {error}. Look at its scores and provenance."
        ) from error
    with saving(Path(path), _MIB, force):
        write_text(Path(path), text)


@verb
def load_mib(path: str | Path) -> Circuit:
    """Read a circuit from MIB's JSON.

    Raises
    ------
    CircuitError
        If the file is missing, a pickle, not JSON, or not a circuit; says which file and where.
    """
    path = Path(path)
    content = read_bytes(path)
    if path.suffix in (".pt", ".pth", ".pkl", ".pickle") or content.startswith(PICKLES):
        raise CircuitError(
            f"{path} is a PyTorch or pickle file, which can run code when it is read; none is read here. Where you "
            "trust it, convert it with EAP-IG: Graph.from_pt('x.pt').to_json('x.json')."
        )
    try:
        data = json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise CircuitError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is not JSON: {error}.") from error
    return from_mib(data, where=str(path))


def _edge(value: Any, where: str) -> tuple[float, bool | None]:
    """What a file says of an edge: its score, and whether it is kept (None where it does not say)."""
    if isinstance(value, bool):
        return math.nan, value
    if not isinstance(value, Mapping):
        return _score(value, where), None
    kept = value.get("in_graph")
    if kept is not None and not isinstance(kept, bool):
        raise CircuitError(f"{where}, in_graph: expected true or false, found {kept!r:.60}.")
    score = _score(value.get("score"), where)
    return math.nan if value.get("scored") is False else score, kept


def _score(value: Any, where: str) -> float:
    """A score as float32 holds it; NaN for none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CircuitError(f"{where}, score: expected a number, found {value!r:.60}.")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if abs(score) > torch.finfo(torch.float32).max:
        raise CircuitError(f"{where}, score: {value!r:.20} is not a finite number of single precision.")
    return score


def _check_nodes(nodes: Any, graph: Graph, where: str) -> None:
    if not isinstance(nodes, Mapping):
        raise CircuitError(f"{where}, nodes: expected an object of nodes by name, found {nodes!r:.60}.")
    known = set(graph.node_names)
    for name, value in nodes.items():
        if name not in known:
            raise CircuitError(f"{where}, nodes: {name!r:.60} is not a node of {graph}.")
        neurons = _mapping(value).get("neurons")
        if neurons is not None and not (isinstance(neurons, list) and all(neurons)):
            raise CircuitError(
                f"{where}, nodes, {name}, neurons: this circuit keeps some of a node's neurons; a circuit of edges "
                "keeps all or none."
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@verb
def load_gv(path: str | Path, graph: Graph) -> Circuit:
    """Read a circuit that Knowledge Circuits released as a graphviz file.

    Such a file is a drawing, and does not say everything:

    - not the model: `graph` does, `Graph(24, 16)` for GPT-2 medium;
    - not whether an edge enters a head by its query, key or value (the released files merge them): all three are
      kept, so that the circuit has more edges than the one that was found; `provenance` counts the merged ones. Names
      that end in `_q`, `_k`, `_v`, which the same code can write, are read as what they say;
    - no scores: a line's width shows an edge's effect only where it exceeds 0.3.

    Parameters
    ----------
    path
        A `.gv` file: a directed graph with the nodes `embed`, `a<layer>.<head>`, `m<layer>` and `resid_post`.
    graph
        The model's graph.

    Returns
    -------
    Circuit
        Without scores.

    Raises
    ------
    CircuitError
        If the file is missing or something in it is not understood; names file and line.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CircuitError(f"{path} is not UTF-8 text: byte {error.start}.") from error
    header = _HEADER.match(text)
    if header is None or not text.rstrip().endswith("}"):
        raise CircuitError(f"{path} is not a whole graphviz file: it should be 'digraph ... {{ ... }}'.")
    open_list = next((found for found in _ATTRIBUTES.finditer(text) if not found[0].endswith("]")), None)
    if open_list is not None:
        line = text.count("\n", 0, open_list.start()) + 1
        raise CircuitError(f"{path}, line {line}: the list of attributes that opens here never ends.")
    body = _ATTRIBUTES.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    kept = torch.zeros_like(graph.exists)
    drawn: set[tuple[Any, Any]] = set()
    merged, above = 0, 1 + text.count("\n", 0, header.end())
    for statement in body[header.end() : body.rindex("}")].split(";"):
        words = statement.lstrip()
        line = above + statement.count("\n", 0, len(statement) - len(words))
        above += statement.count("\n")
        names = [_bare(name) for name in statement.split("->")]
        if names in (["graph"], ["node"], ["edge"], [""]):
            continue
        try:
            places = [_place(name) for name in names]
            for pair in pairwise(places):
                (sender, _), (node, receivers) = pair
                if sender == node or pair in drawn:
                    continue  # a head's own input to its output, which is no edge between nodes; or once more
                drawn.add(pair)
                for name in receivers:
                    kept[graph.edge_index(f"{sender}->{name}")] = True
                merged += len(receivers) == 3
        except CircuitError as error:
            raise CircuitError(f"{path}, line {line}: {error}") from None
    provenance = {"method": "imported", "format": "Knowledge Circuits .gv", "file": path.name, "merged_qkv": merged}
    return Circuit(graph, kept, provenance=provenance)


_HEADER = re.compile(r"\s*(strict\s+)?digraph\b[^{]*\{")
#: What lies in brackets, to the closing one or, where there is none, to the end: each character is looked at once.
_ATTRIBUTES = re.compile(r'\[(?:[^\]"]|"(?:[^"\\]|\\.)*+(?:"|\\?\Z))*+(?:\]|\Z)', re.DOTALL)
_NODE = re.compile(r"a(\d+)\.(\d+)(?:_([qkv]))?|m(\d+)|embed|resid_post")


def _bare(name: str) -> str:
    """A node's name without quotation marks and angle brackets."""
    return name.strip().removeprefix('"').removesuffix('"').removeprefix("<").removesuffix(">")


@functools.lru_cache(maxsize=4096)
def _place(name: str) -> tuple[str, tuple[str, ...]]:
    """A node of a drawing: its name here, and the receivers that a line to it may enter."""
    match = _NODE.fullmatch(name)
    if match is None:
        raise CircuitError(
            f"{name!r:.60} is not understood; nodes are embed, a<layer>.<head>, m<layer> and resid_post (token and "
            "position embeddings are one sender here)."
        )
    layer, head, letter, mlp = match.groups()
    if layer is not None:
        node = f"a{int(layer)}.h{int(head)}"
        return node, tuple(f"{node}<{x}>" for x in letter or "qkv")
    node = f"m{int(mlp)}" if mlp is not None else "input" if name == "embed" else "logits"
    return node, (node,)
