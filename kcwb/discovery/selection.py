"""From scores to a circuit: which edges to keep."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import part
from kcwb.discovery.optimal import optimal_edges
from kcwb.discovery.registry import OPTIMAL_HAS_A_SIZE, SELECTIONS
from kcwb.errors import CircuitError, SettingError, choose
from kcwb.models.graph import Graph
from kcwb.settings import Count
from kcwb.statistics import resample_counts
from kcwb.verbs import verb

_RESAMPLES = 200


def select_edges(
    graph: Graph,
    scores: Float[Tensor, "S R"],
    *,
    edges: int | None = None,
    threshold: float | None = None,
    select: str | float = "signed",
    among: Bool[Tensor, "S R"] | None = None,
) -> Bool[Tensor, "S R"]:
    """Choose edges by score; ties go to the earlier sender, then the earlier receiver.

    Parameters
    ----------
    graph, scores
        The graph and `[S, R]` scores of its edges.
    edges, threshold
        Exactly one: how many edges, or the least score that is kept.
    select
        `signed` takes the highest scores; `absolute` the highest |scores|; a number between the two (0 to 1) the
        highest where a negative score counts for so much of its size: edges against the answer, which the rest of the
        model answers to, matter the more, the larger a circuit is (`kcwb.discovery.tuning`). `greedy` grows from
        `logits`, each time adding the edge of highest |score| into a node that is already there (arXiv 2403.17806),
        which leaves no dead ends; `optimal` the connected circuit of at most `edges` edges with the largest sum of
        scores (`kcwb.discovery.optimal`; seconds for hundreds of edges).
    among
        The edges that may be chosen; None for all.

    Returns
    -------
    Tensor
        `[S, R]` boolean; dangling edges are still in it.
    """
    select = read_selection(select)
    if (edges is None) == (threshold is None):
        raise SettingError("Give either edges (how many) or threshold (the least score), not both or neither.")
    if edges is not None and not 1 <= edges <= graph.n_edges:
        raise SettingError(f"edges={edges}: this graph has {graph.n_edges:,}; ask for 1 to that many.")
    if bool(scores[graph.exists].isnan().any()):
        raise SettingError("Some edges have no score (NaN); only a full set of scores can be selected from.")
    if threshold is not None and select == "optimal":
        raise SettingError(OPTIMAL_HAS_A_SIZE)
    if threshold is not None and math.isnan(threshold):
        raise SettingError("threshold=nan: give the least score that is kept.")
    value = _value(scores, select)
    allowed = graph.exists if among is None else graph.exists & among
    value = value.masked_fill(~allowed, -torch.inf)
    if threshold is not None:
        enough = (value >= threshold) & allowed
        return _greedy(graph, value.masked_fill(~enough, -torch.inf), graph.n_edges) if select == "greedy" else enough
    assert edges is not None  # one of the two was given
    if select == "greedy":
        return _greedy(graph, value, edges)
    if select == "optimal":
        return optimal_edges(graph, value, edges)
    flat = value.flatten()
    least = flat.topk(edges).values[-1]
    kept = flat > least
    ties = (flat == least).nonzero()[:, 0]
    kept[ties[: edges - int(kept.sum())]] = True
    return kept.view_as(value) & allowed


def read_selection(select: str | float) -> str | float:
    """A selection by scores alone; SettingError if it is none."""
    if not isinstance(select, str):
        if not 0 <= select <= 1:
            raise SettingError(f"select={select}: what a negative score counts for is between 0 and 1.")
        return "signed" if select == 0 else "absolute" if select == 1 else select
    if choose("The selection", select, SELECTIONS) == "tuned":
        raise SettingError(
            "select='tuned' runs circuits on D_val, so it is for kcwb.discover; scores alone are selected from by "
            "signed, absolute, greedy, optimal or a number between 0 and 1."
        )
    return select


def _value(scores: Float[Tensor, "S R"], select: str | float) -> Float[Tensor, "S R"]:
    """What edges are ranked by."""
    if select in ("signed", "optimal"):
        return scores
    if isinstance(select, str):
        return scores.abs()
    return torch.where(scores > 0, scores, -select * scores)


def sure_signs(each: Float[Tensor, "N S R"], share: float, seed: int = 0) -> Bool[Tensor, "S R"]:
    """Edges whose mean score has the same sign in at least a share of 200 bootstrap resamples of facts.

    The filter of arXiv 2510.25786: an edge whose sign depends on which facts were drawn says nothing of others.
    """
    counts = torch.from_numpy(resample_counts(len(each), _RESAMPLES, seed)).to(each)
    same = torch.zeros_like(each[0])
    for some in counts:
        same += torch.tensordot(some, each, 1).sign() == each.mean(0).sign()
    return same / len(counts) >= share


def _greedy(graph: Graph, value: Float[Tensor, "S R"], edges: int) -> Bool[Tensor, "S R"]:
    """A heap of the edges into the nodes that are in: take the best, let its sender in."""
    import heapq

    kept = torch.zeros_like(graph.exists)
    columns_of: list[list[int]] = [[] for _ in range(graph.n_senders + 1)]
    for column, node in enumerate(graph.receiver_node.tolist()):
        columns_of[node].append(column)
    inside = {graph.n_senders}
    heap: list[tuple[float, int, int]] = []

    def admit(node: int) -> None:
        for column in columns_of[node]:
            for row, v in enumerate(value[: graph.senders_before(column), column].tolist()):
                if v > -torch.inf:
                    heapq.heappush(heap, (-v, row, column))

    admit(graph.n_senders)
    for _ in range(edges):
        if not heap:
            break
        _, row, column = heapq.heappop(heap)
        kept[row, column] = True
        if row not in inside:
            inside.add(row)
            admit(row)
    return kept


def was_pruned(circuit: Circuit) -> bool:
    """Whether a method found it that prunes, whose scores are no ranking of edges."""
    from kcwb.discovery.methods import METHODS  # which select edges themselves

    method = METHODS.get(str(circuit.provenance.get("method")))
    return method is not None and method.prunes


@verb
def resize(
    circuit: Circuit,
    *,
    edges: Count | None = None,
    threshold: float | None = None,
    select: str | float | None = None,
) -> Circuit:
    """Cut a scored circuit anew, to another size, without scoring again; dangling edges are dropped.

    Parameters
    ----------
    circuit
        A circuit whose every edge has a score (found by attribution). Of one that was found among `stable` edges, these
        alone are kept.
    edges, threshold, select
        As in `select_edges`; `select` defaults to the circuit's own.

    Raises
    ------
    CircuitError
        If the circuit's edges are not all scored, or it was found by pruning: an increase is known for the edges that
        were still there when it was measured, which is no ranking.
    """
    if was_pruned(circuit):
        raise CircuitError(
            f"A circuit that {circuit.provenance['method']} found is resized by searching again with another tau "
            "(`kcwb.tau_path`)."
        )
    if circuit.scores is None or bool(circuit.scores[circuit.graph.exists].isnan().any()):
        raise CircuitError(
            "Only a circuit whose every edge has a score can be resized; run an attribution method first."
        )
    if select is None:
        select = chosen_by(circuit)
    before = part(circuit.provenance, "parameters")
    sure = None if before.get("stable") is None else circuit.scores != 0  # those of other edges were set to 0
    kept = select_edges(circuit.graph, circuit.scores, edges=edges, threshold=threshold, select=select, among=sure)
    parameters = {**before, "edges": edges, "threshold": threshold, "select": select}
    provenance = dict(circuit.provenance, parameters=parameters)
    return replace(circuit, kept=kept, provenance=provenance, session=None).without_dangling()


def chosen_by(circuit: Circuit) -> str | float:
    """How a circuit's edges were chosen by their scores; `signed` where its provenance does not say."""
    found = part(circuit.provenance, "parameters").get("select", "signed")
    return found if isinstance(found, (str, float, int)) else str(found)  # a file may hold anything there


def matched_circuit(graph: Graph, scores: Float[Tensor, "S R"], edges: int, select: str | float = "signed") -> Circuit:
    """The edges of highest score, as many as leave the number nearest to `edges` once dangling ones are dropped."""
    scores = scores.masked_fill(~graph.exists, math.nan).float()

    def of(asked: int) -> Circuit:
        kept = select_edges(graph, scores.nan_to_num(0.0), edges=asked, select=select)
        return Circuit(graph, kept, scores).without_dangling()

    low, high = 0, min(2 * edges, graph.n_edges)
    while high < graph.n_edges and of(high).n_edges < edges:
        low, high = high, min(2 * high, graph.n_edges)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle).n_edges < edges else (low, middle)
    best, above = of(max(low, 1)), of(high)
    return best if edges - best.n_edges < above.n_edges - edges else above
