"""An ensemble of circuits: many draws of one discovery, and so how sure each edge is.

A draw is a circuit that was found with something left to chance: which facts it was found on, in which words, with
which setting, against which ablated values, in which order (`kcwb.discovery.draws`). The **inclusion probability** of
an edge, pi, is the probability that a draw keeps it; here it is the share of K independent draws, and its interval
(Wilson's, over draws) says how far K draws tell it.

**What it depends on.** To every draw k and source of chance i belongs a *twin*, which is draw k with source i taken
from draw k + 1. With d(x, y) the number of edges by which two circuits differ, averaged over draws,

- two independent draws differ by d(draw k, draw k + 1), twice the variance of the edges' indicators;
- `total` = d(draw k, twin) / that: how much of it comes with this source, alone or together with others;
- `alone` = 1 - d(draw k + 1, twin) / that: how much it would be if this source alone were drawn.

They are Sobol's total and first-order indices (the terms of the analysis of variance of independent inputs, in Jansen's
form, Saltelli et al. 2010, doi 10.1016/j.cpc.2009.09.018), summed over edges. Sources that act one by one have equal
`alone` and `total`, which sum to 1; sources that act together have larger totals.

**Bound on false edges** (stability selection, Meinshausen and Buehlmann 2010, doi 10.1111/j.1467-9868.2010.00740.x): if
a draw keeps q of p edges on average, then at most q^2 / ((2c - 1) p) edges of no use have pi >= c > 1/2 on average,
given that draws are on halves of the facts, that idle edges are all alike, and that no edge is found worse than by
chance. These do not hold to the letter, so that the bound stands beside a measured null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.circuit import Circuit, edge_table, node_table
from kcwb.circuits.ensemblefile import load_ensemble, save_ensemble
from kcwb.circuits.provenance import in_brief, part
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from kcwb.settings import Share
from kcwb.statistics import proportion_interval, statistic_interval
from kcwb.verbs import noun, verb

if TYPE_CHECKING:
    from kcwb.models.loading import Model
    from kcwb.tasks.task import Task

#: Confidences that tables and curves take where nothing else is said.
CONFIDENCES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: What a twin's source cannot be called: columns of tables, and fields of the file.
_TAKEN = ("edge", "kept", "sender", "receiver", "pi", "low", "high", "draws", "score", "everything")
_PAIRS = 500  # of draws, that a mean overlap is taken over


@noun
@dataclass(frozen=True, eq=False)
class Ensemble:
    """Draws of a circuit; made by `kcwb.discover_many`.

    Attributes
    ----------
    graph
        The graph that the draws are parts of.
    places
        `[M, 2]`: row and column of every edge that was kept at least once, in the order of the graph.
    kept
        `[K, M]`: which of them each draw keeps.
    twins
        Source -> `[J, M]`: the first J draws, each with this source alone taken from the draw after it.
    scores
        `[M]`: what cutting the edge cost, mean over the draws that evaluated it (nats; NaN if none did).
    provenance
        Everything that determined it, ready for JSON: that of a circuit, and what was drawn.
    halves
        Two ensembles, each of draws from one half of the facts; empty if they were not made.
    """

    graph: Graph
    places: Int[Tensor, "M 2"]
    kept: Bool[Tensor, "K M"]
    twins: Mapping[str, Bool[Tensor, "J M"]]
    scores: Float[Tensor, " M"]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    halves: tuple[Ensemble, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        n_edges, draws = len(self.places), len(self.kept)
        shapes = {"kept": self.kept.shape[1:], "scores": self.scores.shape}
        shapes |= {f"twins of {name}": twin.shape[1:] for name, twin in self.twins.items()}
        for name, shape in shapes.items():
            if tuple(shape) != (n_edges,):
                raise CircuitError(f"An ensemble of {n_edges} edges has {name} of shape {tuple(shape)}.")
        if draws < 2 or any(not 1 <= len(twin) <= draws for twin in self.twins.values()):
            raise CircuitError(f"An ensemble needs at least 2 draws, and no more twins than draws; it has {draws}.")
        for name in self.twins:
            if name in _TAKEN:
                raise CircuitError(f"A source of an ensemble cannot be called {name!r}.")
        masks = (self.kept, *self.twins.values())
        if any(one.dtype != torch.bool for one in masks) or self.places.dtype != torch.long:
            raise CircuitError("An ensemble's draws are boolean, and the places of its edges whole numbers (int64).")
        if len(self.halves) not in (0, 2) or any(half.graph != self.graph for half in self.halves):
            raise CircuitError(
                f"An ensemble has two halves of its own graph, or none; this one has {len(self.halves)}."
            )
        inside = self.places.shape[1:] == (2,) and bool((self.places >= 0).all())
        sizes = torch.tensor(self.graph.exists.shape)
        if not inside or not bool((self.places < sizes).all()) or not bool(self.graph.exists[*self.places.T].all()):
            raise CircuitError(f"An ensemble's edges are not all of {self.graph}.")
        if len(self.places.unique(dim=0)) < n_edges:
            raise CircuitError("An ensemble has an edge twice.")

    def __len__(self) -> int:
        """How many draws there are."""
        return len(self.kept)

    @property
    def inclusion(self) -> Float[Tensor, "S R"]:
        """The inclusion probability of every edge of the graph, `[S, R]`."""
        return self._matrix(self.kept.float().mean(0), 0.0)

    @property
    def edges(self) -> pd.DataFrame:
        """Every edge that was kept at least once, the surest first.

        `sender`, `receiver`; `pi` with `low` and `high`, its 95% interval over draws; `draws`, how many kept it;
        `score`; and for each source that was varied the share of its twins, of draws that kept the edge, that lost it
        (NaN where no such draw has a twin).
        """
        frame = edge_table(self.graph, *self.places.T, **_estimates(self.kept), score=self.scores.numpy())
        for source, twin in self.twins.items():
            before = self.kept[: len(twin)]
            kept = before.sum(0).numpy()
            lost = (before & ~twin).sum(0).numpy()
            frame[source] = np.divide(lost, kept, out=np.full(len(kept), np.nan), where=kept > 0)
        order = np.lexsort((-np.abs(np.nan_to_num(frame["score"])), -frame["pi"]))
        return frame.iloc[order].reset_index(drop=True)

    @property
    def nodes(self) -> pd.DataFrame:
        """Every node that has a kept edge in some draw: `node`, `kind`, `layer`, `head`, and `pi` as of `edges`."""
        frame = node_table(self.graph, **_estimates(self.present))
        frame = frame[frame["draws"] > 0]
        return frame.sort_values("pi", ascending=False, kind="stable", ignore_index=True)

    @property
    def present(self) -> Bool[Tensor, "K nodes"]:
        """Which nodes have a kept edge in each draw, in the order of `graph.node_names`."""
        graph, (rows, columns) = self.graph, self.places.T
        touches = torch.zeros(len(rows), graph.n_senders + 1)
        touches[torch.arange(len(rows)), rows] = 1
        touches[torch.arange(len(rows)), graph.receiver_node[columns]] = 1
        return (self.kept.float() @ touches) > 0

    @property
    def sources(self) -> pd.DataFrame:
        """What the draws depend on: one row per source of chance that was varied, and last `everything`.

        `edges`, by how many edges a draw and its twin differ, in the mean (`everything`: two independent draws);
        `iou`, the edges of both over those of either; `alone` and `total`, each with `low` and `high`, as this module
        defines them. Intervals are bootstrap intervals over draws, taken to be independent, though two pairs
        that follow each other share a draw; an index may fall below 0 by chance.
        """
        rows = []
        for source, twin in self.twins.items():
            j = len(twin)
            before, after = self.kept[:j], self.kept.roll(-1, 0)[:j]
            apart, with_it, without = (_distance(*two) for two in ((before, after), (before, twin), (after, twin)))
            row = {"source": source, "edges": with_it.mean(), "iou": float(_iou(before, twin).mean())}
            for name, of, index in (("alone", without, _one_less), ("total", with_it, _ratio)):
                low, high = statistic_interval([of, apart], index)
                value = float(index(of, apart)) if apart.any() else math.nan
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        left, right = self._pairs()
        everything = {"source": "everything", "edges": _distance(left, right).mean(), "iou": _iou(left, right).mean()}
        columns = ["source", "edges", "iou", *(f"{a}{b}" for a in ("alone", "total") for b in ("", "_low", "_high"))]
        return pd.DataFrame([*rows, everything], columns=columns)

    @property
    def size(self) -> float:
        """How many edges a draw keeps, in the mean."""
        return float(self.kept.sum(1).double().mean())

    @verb
    def consensus(self, confidence: Share = 0.5) -> Circuit:
        """The circuit of the edges with pi of at least `confidence`, without dangling ones."""
        chosen = self.kept.double().mean(0) >= confidence - 1e-9
        provenance = dict(self.provenance) | {"consensus": {"confidence": confidence, "draws": len(self)}}
        kept = self._matrix(chosen, False)
        return Circuit(self.graph, kept, self._matrix(self.scores, math.nan), provenance).without_dangling()

    @verb
    def bound(self, confidences: Sequence[Share] = CONFIDENCES, null: Ensemble | None = None) -> pd.DataFrame:
        """How many of the edges at a confidence may be false.

        Parameters
        ----------
        confidences
            The least pi.
        null
            The same draws on shuffled answers: `discover_many(..., shuffled=True)`.

        Returns
        -------
        DataFrame
            One row per confidence c: `confidence`; `edges` with pi of at least that; `bound`, q^2 / ((2c - 1) p), at
            most how many of them are false in the mean, under the assumptions that this module names (infinite up to
            c = 1/2); and `null`, how many edges reach it on shuffled answers (NaN without a null).
        """
        if null is not None and null.graph != self.graph:
            raise CircuitError(f"The null is of {null.graph}; this ensemble is of {self.graph}.")
        rows = []
        for c in confidences:
            limit = self.size**2 / ((2 * c - 1) * self.searched) if c > 0.5 else math.inf
            counts = [math.nan if one is None else one._reaching(c) for one in (self, null)]
            rows.append((c, counts[0], limit, counts[1]))
        return pd.DataFrame(rows, columns=["confidence", "edges", "bound", "null"]).astype({"edges": int})

    @property
    def searched(self) -> int:
        """How many edges a draw chose among: all of the graph, or those of the circuit that it was kept within."""
        within = part(self.provenance, "parameters").get("within")
        edges = within.get("edges") if isinstance(within, Mapping) else None
        return edges if type(edges) is int and edges > 0 else self.graph.n_edges

    @verb
    def curve(self, model: Model, task: Task, **settings: Any) -> pd.DataFrame:
        """Size, Hit@10 and loss against confidence, on facts that no draw has seen: `confidence_curve` of this one."""
        from kcwb.evaluation.confidence import confidence_curve

        return confidence_curve(model, self, task, **settings)

    @verb
    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the ensemble to one JSON file.

        Parameters
        ----------
        path
            Where to; missing folders are made. An ensemble that is there is replaced.
        force
            Replace a file of another kind, too.

        Raises
        ------
        CircuitError
            If it cannot be written there, or something is there that is no ensemble; it is as it was.
        """
        save_ensemble(self, Path(path), force)

    @classmethod
    @verb
    def load(cls, path: str | Path) -> Ensemble:
        """Read an ensemble that `save` wrote.

        Raises
        ------
        CircuitError
            If the file is missing, damaged, or not an ensemble; says which and where.
        """
        return load_ensemble(Path(path))

    def __repr__(self) -> str:
        """One line: draws, sizes and where it comes from."""
        return (
            f"Ensemble({len(self)} draws of {self.size:,.0f} edges{in_brief(self.provenance)}; "
            f"{self._reaching(0.9):,} edges in nine of ten draws, {len(self.places):,} in some)"
        )

    def _reaching(self, confidence: float) -> int:
        return int((self.kept.double().mean(0) >= confidence - 1e-9).sum())

    def _matrix(self, values: Tensor, otherwise: float | bool) -> Tensor:
        matrix = torch.full(self.graph.exists.shape, otherwise, dtype=values.dtype)
        matrix[*self.places.T] = values
        return matrix

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Pairs of draws: all, or as many as can be looked at, drawn with a fixed seed."""
        pairs = np.array(list(combinations(range(len(self)), 2)))
        if len(pairs) > _PAIRS:
            pairs = np.random.default_rng(0).choice(pairs, _PAIRS, replace=False)
        return self.kept[pairs[:, 0]], self.kept[pairs[:, 1]]


@verb
def weighted_iou(left: Circuit | Ensemble, right: Circuit | Ensemble) -> float:
    """The overlap of two circuits or ensembles: sum of the smaller pi of each edge over that of the larger.

    The pi of a circuit's edges is 1 or 0, so that of two circuits it is `Circuit.iou`; 1.0 for two empty ones.
    """
    if left.graph != right.graph:
        raise CircuitError(f"Circuits of different graphs have no overlap: {left.graph}; {right.graph}.")
    a, b = inclusion(left), inclusion(right)
    either = float(torch.maximum(a, b).sum())
    return float(torch.minimum(a, b).sum()) / either if either else 1.0


def inclusion(one: Circuit | Ensemble) -> Float[Tensor, "S R"]:
    """How sure each edge is: pi, which of a circuit's edges is 1 or 0."""
    return one.kept.float() if isinstance(one, Circuit) else one.inclusion


def node_inclusion(one: Circuit | Ensemble) -> Float[np.ndarray, " nodes"]:
    """How sure each node is, in the order of `graph.node_names`; those of a circuit are 1 or 0."""
    if isinstance(one, Circuit):
        return one.touched.astype(float)
    return one.present.double().mean(0).numpy()


def _estimates(kept: Bool[Tensor, "K X"]) -> dict[str, np.ndarray]:
    """The share of draws, with its interval, and their number, of each column."""
    draws, counts = len(kept), kept.sum(0).numpy()
    found, places = np.unique(counts, return_inverse=True)
    bounds = np.array([_interval(int(count), draws) for count in found]).reshape(-1, 2)[places]
    return {"pi": counts / draws, "low": bounds[:, 0], "high": bounds[:, 1], "draws": counts}


@lru_cache(maxsize=4096)
def _interval(count: int, draws: int) -> tuple[float, float]:
    """The interval of a share of draws; of the same few numbers again and again while a slider is moved."""
    return proportion_interval(np.arange(draws) < count)


def _distance(left: Tensor, right: Tensor) -> np.ndarray:
    """By how many edges each circuit differs from its partner."""
    return (left ^ right).sum(1).double().numpy()


def _iou(left: Tensor, right: Tensor) -> np.ndarray:
    """Edges of both over edges of either, 1 for two empty circuits."""
    both, either = (left & right).sum(1).double(), (left | right).sum(1).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).numpy()


def _ratio(of: Any, to: Any, axis: int = -1) -> Any:
    return np.mean(of, axis) / np.mean(to, axis)


def _one_less(of: Any, to: Any, axis: int = -1) -> Any:
    return 1 - _ratio(of, to, axis)
