"""Sequential ACDC, the oracle of the fast one."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.sequential import NEAR_TIE, Pruned, receiver_order, sender_order
from kcwb.models.loading import Model
from kcwb.tasks.metrics import Loss


def acdc_sequential(
    model: Model,
    loss: Loss,
    ablation: Ablation,
    *,
    tau: float,
    absolute: bool = False,
    within: Bool[Tensor, "S R"] | None = None,
    order: int | None = None,
) -> Pruned:
    """Prune by the definition (`kcwb.discovery.sequential`): one run of the whole circuit per edge."""
    graph = model.graph
    kept = (graph.exists if within is None else within).clone()
    increases = torch.full(kept.shape, torch.nan)
    senders = sender_order(graph, order)

    def measure() -> float:
        return float(loss(run_circuit(model, kept, loss.prompts, ablation)))

    current, evaluations = measure(), 1
    for column in receiver_order(graph, order):
        node = int(graph.receiver_node[column])
        if node < graph.n_senders and not kept[model.network.together(node)].any():
            kept[:, column] = False
        else:
            for row in senders[kept[senders, column]].tolist():
                kept[row, column] = False
                changed = measure()
                evaluations += 1
                increase = changed - current
                increases[row, column] = increase
                if (abs(increase) if absolute else increase) < tau:
                    current = changed
                else:
                    kept[row, column] = True
    measured = increases.abs() if absolute else increases
    near = int(((measured - tau).abs() < NEAR_TIE).sum())
    return Pruned(kept, increases, current, evaluations, near)
