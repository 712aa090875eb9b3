"""Two circuits side by side: what they share, in numbers."""

from __future__ import annotations

import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.verbs import verb


@verb
def compare_circuits(left: Circuit, right: Circuit) -> pd.DataFrame:
    """Count the edges and nodes that two circuits of one graph share.

    Returns
    -------
    DataFrame
        Rows `edges` and `nodes` (heads and MLPs with a kept edge); columns `left`, `right`, `shared`, `only_left`,
        `only_right` and `iou`, shared over either (1.0 for two empty circuits).

    Raises
    ------
    CircuitError
        If their graphs differ.
    """
    shared = (left & right).n_edges  # raises where graphs differ
    rows = {"edges": _row(left.n_edges, right.n_edges, shared)}
    nodes = [set(c.nodes.loc[c.nodes["kind"].isin(["head", "mlp"]), "node"]) for c in (left, right)]
    rows["nodes"] = _row(len(nodes[0]), len(nodes[1]), len(nodes[0] & nodes[1]))
    return pd.DataFrame.from_dict(rows, orient="index")


def _row(left: int, right: int, shared: int) -> dict[str, float]:
    either = left + right - shared
    return {
        "left": left,
        "right": right,
        "shared": shared,
        "only_left": left - shared,
        "only_right": right - shared,
        "iou": shared / either if either else 1.0,
    }
