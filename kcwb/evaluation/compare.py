"""Two circuits side by side: what they share, in numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, inclusion, node_inclusion
from kcwb.errors import CircuitError
from kcwb.verbs import verb


@verb
def compare_circuits(left: Circuit | Ensemble, right: Circuit | Ensemble) -> pd.DataFrame:
    """Count the edges and nodes that two circuits of one graph share.

    An ensemble's edges and nodes count by their pi: it has the sum of them, and two share the smaller of both of each,
    so that `iou` of edges is `kcwb.circuits.weighted_iou`. For circuits, whose pi are 1 or 0, that is counting.

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
    if left.graph != right.graph:
        raise CircuitError(f"Circuits of different graphs do not compare: {left.graph}; {right.graph}.")
    edges = [inclusion(one).double().numpy() for one in (left, right)]
    nodes = [node_inclusion(one)[1:-1] for one in (left, right)]
    frame = pd.DataFrame.from_dict({"edges": _row(*edges), "nodes": _row(*nodes)}, orient="index")
    counted = isinstance(left, Circuit) and isinstance(right, Circuit)
    return frame.astype(dict.fromkeys(frame.columns[:-1], int)) if counted else frame


def _row(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """What two weights of the same things have in common."""
    own, other, shared = (float(one.sum()) for one in (left, right, np.minimum(left, right)))
    either = own + other - shared
    return {
        "left": own,
        "right": other,
        "shared": shared,
        "only_left": own - shared,
        "only_right": other - shared,
        "iou": shared / either if either else 1.0,
    }
