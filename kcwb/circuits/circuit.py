"""A circuit: the edges that are kept, their scores, and where they come from; on disk: `kcwb.circuits.circuitfile`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order
from torch import Tensor

from kcwb.circuits.circuitfile import edges_digest, load_circuit, save_circuit
from kcwb.circuits.provenance import in_brief
from kcwb.circuits.session import Session, session_of
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from kcwb.settings import Score
from kcwb.verbs import noun, verb


@noun
@dataclass(frozen=True, eq=False)
class Circuit:
    """A subgraph.

    Attributes
    ----------
    graph
        The graph that it is part of.
    kept
        `[S, R]`: True for the edges that it keeps; rows are senders, columns receivers. Both are taken to the CPU.
    scores
        `[S, R]` float32: what cutting an edge alone is worth, by the method that found the circuit (nats; positive:
        cutting hurts); NaN where it was not scored. None if nothing was.
    provenance
        Everything that determined it, ready for JSON: model and relation with digests, facts, method and parameters,
        seed, versions, seconds.
    session
        What a person has done to it (`with_session`), or None.
    """

    graph: Graph
    kept: Bool[Tensor, "S R"]
    scores: Float[Tensor, "S R"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    session: Session | None = None

    def __post_init__(self) -> None:
        """Refuse masks that do not fit the graph; take what a method found on a GPU or in half precision."""
        exists = self.graph.exists
        if self.kept.shape != exists.shape or self.kept.dtype != torch.bool:
            raise CircuitError(
                f"kept must be boolean with shape {tuple(exists.shape)}, found {self.kept.dtype} "
                f"{tuple(self.kept.shape)}."
            )
        if self.scores is not None and self.scores.shape != exists.shape:
            raise CircuitError(f"scores must have shape {tuple(exists.shape)}, found {tuple(self.scores.shape)}.")
        object.__setattr__(self, "kept", self.kept.cpu())
        if self.scores is not None:
            object.__setattr__(self, "scores", self.scores.detach().to("cpu", torch.float32))
        wrong = (self.kept & ~exists).nonzero()
        if len(wrong):
            raise CircuitError(f"{self.graph} has no edge {self.graph.edge_name(*wrong[0].tolist())}.")
        if self.session is not None and self.session.circuit != self.digest:
            raise CircuitError("The session is of other edges. Keep it by with_session, or leave it out: session=None.")

    @classmethod
    @verb
    def full(cls, graph: Graph) -> Circuit:
        """The circuit that keeps every edge."""
        return cls(graph, graph.exists.clone())

    @classmethod
    @verb
    def empty(cls, graph: Graph) -> Circuit:
        """The circuit that keeps none."""
        return cls(graph, torch.zeros_like(graph.exists))

    @classmethod
    @verb
    def from_edges(cls, graph: Graph, edges: Mapping[str, Score] | Sequence[str], **more: Any) -> Circuit:
        """The circuit that keeps the named edges (`sender->receiver`), with their scores if given."""
        kept = torch.zeros_like(graph.exists)
        scores = torch.full(kept.shape, math.nan) if isinstance(edges, Mapping) else None
        for name in edges:
            index = graph.edge_index(name)
            kept[index] = True
            if scores is not None and isinstance(edges, Mapping):
                scores[index] = edges[name]
        return cls(graph, kept, scores, **more)

    @property
    def n_edges(self) -> int:
        """How many edges it keeps."""
        return int(self.kept.sum())

    @property
    def n_nodes(self) -> int:
        """How many heads and MLPs have a kept edge."""
        return int(self.touched[1:-1].sum())

    @property
    def ablation(self) -> str:
        """What its cut edges delivered when it was found; `zero` if its provenance does not say."""
        return str(self.provenance.get("ablation", "zero"))

    @property
    def edges(self) -> pd.DataFrame:
        """The kept edges: `sender`, `receiver`, `score`, strongest first."""
        rows, columns = self.kept.nonzero(as_tuple=True)
        frame = edge_table(self.graph, rows, columns, score=self._score_of(rows, columns))
        return frame.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)

    @property
    def nodes(self) -> pd.DataFrame:
        """The nodes with a kept edge: `node`, `kind`, `layer`, `head`, `in_edges`, `out_edges`, `score`.

        `score` is the sum of the absolute scores of the node's outgoing edges (of the incoming ones, for `logits`).
        """
        graph = self.graph
        into, out = self.node_matrix.sum(0), self.node_matrix.sum(1)
        rows, columns = self.kept.nonzero(as_tuple=True)
        strength = np.abs(np.nan_to_num(self._score_of(rows, columns)))
        sent = np.bincount(rows.numpy(), strength, minlength=graph.n_senders + 1)
        sent[-1] = strength[columns.numpy() == graph.n_receivers - 1].sum()
        frame = node_table(graph, in_edges=into, out_edges=out, score=sent)
        return frame[(into + out) > 0].reset_index(drop=True)

    @property
    def node_matrix(self) -> np.ndarray:
        """`[nodes, nodes]`: how many kept edges lead from one node to another, in the order of `graph.node_names`."""
        rows, columns = self.kept.nonzero(as_tuple=True)
        n_nodes = self.graph.n_senders + 1
        matrix = np.zeros((n_nodes, n_nodes), dtype=np.int64)
        np.add.at(matrix, (rows.numpy(), self.graph.receiver_node[columns].numpy()), 1)
        return matrix

    @property
    def touched(self) -> np.ndarray:
        """`[nodes]`: which nodes have a kept edge."""
        matrix = self.node_matrix
        return matrix.sum(0) + matrix.sum(1) > 0

    def without_dangling(self) -> Circuit:
        """Keep only the edges that lie on a path from `input` to `logits`."""
        matrix = csr_array(self.node_matrix)
        n_nodes = self.graph.n_senders + 1
        after_input, before_logits = np.zeros(n_nodes, bool), np.zeros(n_nodes, bool)
        after_input[breadth_first_order(matrix, 0, return_predecessors=False)] = True
        before_logits[breadth_first_order(matrix.T.tocsr(), n_nodes - 1, return_predecessors=False)] = True
        sends = torch.from_numpy(after_input)[:-1]
        counts = torch.from_numpy(before_logits)[self.graph.receiver_node]
        kept = self.kept & sends[:, None] & counts[None, :]
        return replace(self, kept=kept, session=self.session if kept.equal(self.kept) else None)

    @verb
    def with_session(self, session: Session | None) -> Circuit:
        """The same circuit with what a person has done to it, which `save` writes and `load` reads; None for nothing.

        Raises
        ------
        CircuitError
            If the session is of another circuit, or names nodes or edges that this one has not.
        """
        return replace(self, session=None if session is None else session_of(self, session))

    def __or__(self, other: Circuit) -> Circuit:
        """The edges of either."""
        return self._combine(other, torch.logical_or, "union")

    def __and__(self, other: Circuit) -> Circuit:
        """The edges of both."""
        return self._combine(other, torch.logical_and, "intersection")

    def __sub__(self, other: Circuit) -> Circuit:
        """The edges of the left one that the right one lacks."""
        return self._combine(other, lambda left, right: left & ~right, "difference")

    def complement(self) -> Circuit:
        """The edges that it cuts."""
        return Circuit.full(self.graph) - self

    @verb
    def iou(self, other: Circuit) -> float:
        """Edges of both over edges of either; 1.0 for two empty circuits."""
        either = (self | other).n_edges
        return (self & other).n_edges / either if either else 1.0

    def _combine(self, other: Circuit, merge: Callable[[Tensor, Tensor], Tensor], verb: str) -> Circuit:
        if self.graph != other.graph:
            raise CircuitError(f"Circuits of different graphs do not combine: {self.graph}; {other.graph}.")
        provenance: dict[str, Any] = {"method": verb, "of": [dict(self.provenance), dict(other.provenance)]}
        said = [one for one in provenance["of"] if one]  # a circuit made by hand, or of all edges, says nothing
        for key in ("model", "ablation"):
            if said and key in said[0] and all(one.get(key) == said[0][key] for one in said):
                provenance[key] = said[0][key]
        scores = self.scores
        if scores is None or other.scores is None:
            scores = other.scores if scores is None else scores
        elif verb == "union":
            scores = torch.where(scores.isnan() | ~self.kept & other.kept, other.scores, scores)
        return Circuit(self.graph, merge(self.kept, other.kept), scores, provenance)

    def _score_of(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        if self.scores is None:
            return np.full(len(rows), np.nan, dtype=np.float32)
        return self.scores[rows, columns].numpy()

    @property
    def digest(self) -> str:
        """SHA-256 of the graph's sizes and the kept edges' names."""
        edges = self.kept.nonzero().tolist()
        return edges_digest(self.graph, sorted(self.graph.edge_name(*edge) for edge in edges))

    @verb
    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the circuit to a JSON file, and the scores of all edges to a safetensors file beside it.

        Parameters
        ----------
        path
            Where to; missing folders are made. A circuit that is there is replaced.
        force
            Replace a file of another kind, too.

        Raises
        ------
        CircuitError
            If it cannot be written there, or something is there that is no circuit; it is as it was.
        """
        save_circuit(self, Path(path), force)

    @classmethod
    @verb
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit that `save` wrote; without the scores file beside it, only kept edges have scores.

        Raises
        ------
        CircuitError
            If a file is missing, damaged, or not a circuit; says which file and where.
        """
        return load_circuit(Path(path))

    def __repr__(self) -> str:
        """One line: size and where it comes from."""
        return (
            f"Circuit({self.n_edges:,} of {self.graph.n_edges:,} edges, {self.n_nodes} of "
            f"{self.graph.n_senders - 1} heads and MLPs{in_brief(self.provenance)})"
        )


def edge_table(graph: Graph, rows: Int[Tensor, " E"], columns: Int[Tensor, " E"], **more: Any) -> pd.DataFrame:
    """Some edges as a table: `sender`, `receiver`, and more columns."""
    senders, receivers = (np.array(names, dtype=object) for names in (graph.sender_names, graph.receiver_names))
    return pd.DataFrame({"sender": senders[rows.numpy()], "receiver": receivers[columns.numpy()], **more})


def node_table(graph: Graph, **more: Any) -> pd.DataFrame:
    """All nodes as a table: `node`, `kind`, `layer`, `head`, and more columns."""
    frame = pd.DataFrame([graph.node(name) for name in graph.node_names])
    frame.insert(0, "node", graph.node_names)
    return frame.assign(**more)
