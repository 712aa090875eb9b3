"""The connected circuit of a given size with the highest sum of scores: a mixed-integer program (arXiv 2510.25786).

Taking the edges of highest score and dropping what dangles wastes part of a small budget on edges that lead nowhere.
Here every edge that is kept is on a path from `input` to `logits`. With x_e = 1 for a kept edge and y_u = 1 for a node
that is in:

    maximise  sum_e s_e x_e    subject to  1 <= sum_e x_e <= n
    x_e <= y_sender(e),  x_e <= y_receiver(e)
    y_u <= sum of x over the edges into u      (not for `input`)
    y_u <= sum of x over the edges out of u    (not for `logits`)

The graph has no cycles, so that a node with a kept edge in and one out lies on a path. Solved by HiGHS through
`scipy.optimize.milp`, among the `_EDGES` edges of highest score for each edge of the budget.
"""

from __future__ import annotations

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from kcwb.errors import SettingError, warn
from kcwb.models.graph import Graph

#: Edges that are considered for each one of the budget, at least `_LEAST` in all.
_EDGES, _LEAST = 15, 1000
_SECONDS = 120


def optimal_edges(graph: Graph, value: Float[Tensor, "S R"], edges: int) -> Bool[Tensor, "S R"]:
    """At most `edges` edges, all on paths from `input` to `logits`, whose values have the largest sum.

    Parameters
    ----------
    graph, value
        The graph, and `[S, R]` values of its edges; -inf for one that may not be taken.
    edges
        The budget.

    Warns
    -----
    UserWarning
        If the best circuit that was found in two minutes is not shown to be the best there is.

    Raises
    ------
    SettingError
        If the edges that are considered hold no path of so many, or none was found in two minutes.
    """
    allowed = int((value > -torch.inf).sum())
    flat = value.flatten().topk(min(allowed, max(_LEAST, _EDGES * edges))).indices.sort().values
    rows, columns = (flat // value.shape[1]).cpu(), (flat % value.shape[1]).cpu()
    senders, receivers = rows.numpy(), graph.receiver_node[columns].numpy()
    n_edges, n_nodes = len(flat), graph.n_senders + 1
    each, edge = np.arange(n_edges), sparse.csr_matrix(sparse.identity(n_edges))
    nodes = [sparse.csr_matrix((np.ones(n_edges), (each, of)), (n_edges, n_nodes)) for of in (senders, receivers)]
    out_of, into = nodes
    own = sparse.csr_matrix(sparse.identity(n_nodes))
    count = sparse.csr_matrix(np.ones((1, n_edges)))
    blocks = [[count, sparse.csr_matrix((1, n_nodes))], [-count, sparse.csr_matrix((1, n_nodes))]]
    blocks += [[edge, -side] for side in nodes]
    blocks += [[-into.T[1:], own[1:]], [-out_of.T[:-1], own[:-1]]]
    most = np.zeros(2 + 2 * n_edges + 2 * (n_nodes - 1))
    most[:2] = edges, -1
    result = scipy.optimize.milp(
        np.concatenate([-value.flatten()[flat].double().cpu().numpy(), np.zeros(n_nodes)]),
        constraints=scipy.optimize.LinearConstraint(sparse.bmat(blocks, format="csr"), -np.inf, most),  # pyright: ignore
        integrality=np.ones(n_edges + n_nodes),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"time_limit": _SECONDS, "mip_rel_gap": 1e-9},
    )
    if result.x is None:
        raise SettingError(
            f"Among the {n_edges:,} edges of highest score no {edges} were found that make a path from input to logits "
            f"({result.message}) Ask for more edges, or use select='greedy'."
        )
    if result.status != 0:
        warn(
            f"The best choice of {edges} edges is not proven: another may have a sum up to {result.mip_gap:.1%} higher "
            f"({_SECONDS} s are over)."
        )
    kept = torch.zeros_like(graph.exists)
    chosen = torch.from_numpy(result.x[:n_edges] > 0.5)
    kept[rows[chosen], columns[chosen]] = True
    return kept
