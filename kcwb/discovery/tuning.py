"""How much edges against the answer are to count for, tried out on D_val.

Attribution gives an edge whose cut would lower the loss a negative score. A small circuit is better without such edges;
but the rest of the model answers to them, and a large circuit that lacks them stays away from the model however large
it is. So neither signed scores nor absolute ones serve all sizes. `select="tuned"` lets a negative score count for a
share of its size, of `SHARES` the one whose circuit comes nearest to the model's own loss on D_val (a circuit that
answers better than the model is not the model either). That takes a run of each, and one of the model.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.gates import GatedLoss
from kcwb.discovery.selection import select_edges
from kcwb.models.loading import Model
from kcwb.parallel import on_each_core
from kcwb.tasks.metrics import Loss

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Tuning:
    """The shares, tried on a task's D_val.

    Parameters
    ----------
    model, loss, ablation
        The model, the metric on D_val, and what cut edges deliver.
    """

    def __init__(self, model: Model, loss: Loss, ablation: Ablation) -> None:
        self.model, self._runs = model, GatedLoss(model, loss, ablation)
        self._whole = cache(lambda: self._runs.of(model.graph.exists))

    def share(
        self,
        scores: Float[Tensor, "S R"],
        *,
        edges: int | None = None,
        threshold: float | None = None,
        among: Bool[Tensor, "S R"] | None = None,
    ) -> float:
        """What a negative score is to count for (`select_edges`); of equally near ones the smallest."""
        graph = self.model.graph
        tried = [
            Circuit(graph, select_edges(graph, scores, edges=edges, threshold=threshold, select=share, among=among))
            .without_dangling()
            .kept
            for share in SHARES
        ]
        same = [next(i for i, other in enumerate(tried) if torch.equal(one, other)) for one in tried]
        different = sorted(set(same))
        if len(different) == 1:  # no score that would be kept is negative
            return SHARES[0]
        losses = np.array([*on_each_core(self._runs.of, [tried[i] for i in different], self.model.device)])
        return SHARES[different[int(np.abs(losses - self._whole()).argmin())]]
