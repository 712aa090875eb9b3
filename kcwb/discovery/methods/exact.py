"""The exact effect of every single edge: what attribution estimates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.registry import Method
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.tasks.metrics import Loss


def exact_effects(model: Model, loss: Loss, ablation: Ablation, *, progress: Progress = False) -> Float[Tensor, "S R"]:
    """The exact cost of cutting each edge alone: M(G without e) - M(G); one run per edge, so for tiny models.

    Returns
    -------
    Tensor
        `[S, R]` float32; 0 where there is no edge.
    """
    kept = model.graph.exists.clone()
    scores = torch.zeros(kept.shape)
    full = float(loss(run_circuit(model, kept, loss.prompts, ablation)))
    with track(progress, model.graph.n_edges, "exact effects") as step:
        for row, column in kept.nonzero().tolist():
            kept[row, column] = False
            scores[row, column] = float(loss(run_circuit(model, kept, loss.prompts, ablation))) - full
            kept[row, column] = True
            step()
    return scores


EXACT = Method("exact", exact_effects)
