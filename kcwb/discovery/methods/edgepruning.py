"""`edge-pruning`: gates on edges are learned by gradient descent, most of them to be shut (arXiv 2406.16778).

Each gate is a hard concrete variable (Louizos et al., arXiv 1712.01312): with u uniform,

    z = clamp(1.2 sigmoid((log u - log(1 - u) + log_alpha) / beta) - 0.1, 0, 1),  beta = 2/3

is 0 or 1 with some chance, and what lies between has a gradient by `log_alpha`. The loss on D_val is minimised under
the constraint that as many gates are open on average, sum of P(z > 0), as edges are asked for: a Lagrangian whose two
multipliers grow by gradient ascent. The number asked for falls from that at the start to the aim over two thirds of
the updates. Warm start (arXiv 2510.06811): the gates of `start` edges of highest |score| by `gim`, by their rank; all
other edges are cut. In the end the gates of highest `log_alpha` are open.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.gates import GatedLoss
from kcwb.discovery.registry import Method, Pruning, check_size
from kcwb.discovery.selection import matched_circuit, select_edges
from kcwb.errors import SettingError
from kcwb.models import rules
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Positive, Seed
from kcwb.tasks.metrics import Loss

_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1


def hard_concrete(log_alpha: Float[Tensor, " E"], u: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
    """Gates drawn with the uniform numbers `u`."""
    s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / _BETA)
    return ((_HIGH - _LOW) * s + _LOW).clamp(0, 1)


def chance_open(log_alpha: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - _BETA * math.log(-_LOW / _HIGH))


def edge_pruning(
    model: Model,
    loss: Loss,
    ablation: Ablation,
    *,
    edges: Count | None = None,
    start: Count = 4000,
    updates: Count = 150,
    rate: Positive = 0.2,
    seed: Seed = 0,
    progress: Progress = False,
) -> Pruning:
    """Edges whose gates are open in the end, about `edges` of them on paths (1% of all); scores are `log_alpha`.

    `updates` of Adam at learning rate `rate`; `seed` of the draws of gates. SettingError if no path is among the edges
    that it starts with.
    """
    graph, gated, device = model.graph, GatedLoss(model, loss, ablation), model.device
    edges = check_size(graph, edges, model.name)
    generator = torch.Generator().manual_seed(seed)
    first = attribution_scores(model, loss, ablation, steps=5, rules=rules.GIM)
    kept = select_edges(graph, first, edges=min(max(start, edges), graph.n_edges), select="absolute")
    kept = Circuit(graph, kept).without_dangling().kept
    places = kept.nonzero()
    if not len(places):
        raise SettingError(f"start={start}: the edges of highest score lead from nowhere to nowhere. Start with more.")
    ranks = first[*places.T].abs().argsort().argsort().float()
    log_alpha = ((ranks + 0.5) / len(places)).logit().to(device).requires_grad_()
    multipliers = torch.zeros(2, device=device, requires_grad=True)
    descent = torch.optim.Adam([log_alpha], lr=rate)
    ascent = torch.optim.Adam([multipliers], lr=5 * rate, maximize=True)
    at_first = float(chance_open(log_alpha.detach()).sum())
    with track(progress, updates, "edge-pruning") as step:
        for i in range(updates):
            aim = at_first + (edges - at_first) * min(1.0, 1.5 * (i + 1) / updates)
            u = torch.rand(len(places), generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
            with torch.enable_grad():
                gates = hard_concrete(log_alpha, u)
                surplus = (chance_open(log_alpha).sum() - aim) / at_first
                price = multipliers[0] * surplus + multipliers[1] * surplus**2
            value, slope = gated(places, gates.detach(), kept)
            descent.zero_grad()
            ascent.zero_grad()
            torch.autograd.backward([gates, price], [slope, torch.ones_like(price)])
            descent.step()
            ascent.step()
            step(note=f"loss {value:.2f}, {float(chance_open(log_alpha.detach()).sum()):,.0f} edges")
    scores = torch.full(graph.exists.shape, -1e9)
    scores[*places.T] = log_alpha.detach().cpu()
    found = matched_circuit(graph, scores, min(edges, len(places))).kept & kept
    found = Circuit(graph, found).without_dangling().kept
    report = {"loss": gated.of(found), "open": float(chance_open(log_alpha.detach()).sum())}
    return Pruning(found, scores.masked_fill(~kept, math.nan), report)


EDGE_PRUNING = Method("edge-pruning", edge_pruning, prunes=True, varied=("edges",))
