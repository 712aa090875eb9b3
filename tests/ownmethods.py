"""Two methods of discovery from outside the package: each a function and one line."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.discovery.registry import Method, Pruning, register_method
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Seed, Share
from kcwb.tasks.metrics import Loss


def random_scores(
    model: Model, loss: Loss, ablation: Ablation, *, seed: Seed = 0, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """A random score for each edge."""
    return torch.rand(model.graph.exists.shape, generator=torch.Generator().manual_seed(seed))


def keep_some(
    model: Model, loss: Loss, ablation: Ablation, *, share: Share = 0.5, progress: Progress = False
) -> Pruning:
    """The first edges of the graph."""
    edges = model.graph.exists.nonzero()
    kept = torch.zeros_like(model.graph.exists)
    rows, columns = edges[: round(share * len(edges))].unbind(1)
    kept[rows, columns] = True
    return Pruning(kept, torch.full(kept.shape, torch.nan), {"looked_at": len(edges)})


register_method(Method("toy-scores", random_scores))
register_method(Method("toy-prunes", keep_some, "zero", prunes=True))
