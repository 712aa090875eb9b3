"""`ig-prune`: cut the weakest edges, score those that are left anew, and so on (`kcwb.discovery.gates`)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.gates import GatedLoss
from kcwb.discovery.registry import Method
from kcwb.discovery.selection import select_edges
from kcwb.models import rules
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count
from kcwb.tasks.metrics import Loss

#: Where pruning ends: edges below which few circuits hold together.
_FEWEST = 30


def ig_prune(
    model: Model,
    loss: Loss,
    ablation: Ablation,
    *,
    start: Count = 6000,
    signed_below: Count = 1500,
    rounds: Count = 12,
    steps: Count = 4,
    progress: Progress = False,
) -> Float[Tensor, "S R"]:
    """The place of each edge in the order in which edges are cut, over how many there are: 1 for the one cut last.

    All but the `start` edges of highest |score| by `gim` (its gradients averaged over five points) are cut at once, and
    rank by that. In each of `rounds` rounds the gates of what is left are scored by integrated gradients over `steps`
    points, and the weakest edges are cut, the same share each time: by |score| as long as there are more than
    `signed_below` edges, so that what opposes the answer stays to be opposed, and by score below. Of the edges that a
    round cuts, those of small |score| go first, and those that then dangle last.
    """
    graph, gated = model.graph, GatedLoss(model, loss, ablation)
    first = attribution_scores(model, loss, ablation, steps=5, rules=rules.GIM)
    kept = select_edges(graph, first, edges=min(start, graph.n_edges), select="absolute")
    kept = Circuit(graph, kept).without_dangling().kept
    share = (_FEWEST / max(_FEWEST, int(kept.sum()))) ** (1 / rounds)
    others = (graph.exists & ~kept).nonzero()
    order = [others[first[*others.T].abs().argsort(stable=True)]]  # edges that are cut, the weakest first
    with track(progress, rounds + 1, "ig-prune") as step:
        for _ in range(rounds):
            edges, sizes = _by_strength(gated, kept, signed_below, steps)
            cut = max(0, len(edges) - max(_FEWEST, int(share * len(edges))))
            left = kept.clone()
            left[*edges[:cut].T] = False
            left_in_paths = Circuit(graph, left).without_dangling().kept
            if not left_in_paths.any():
                break
            dangling = left & ~left_in_paths
            order += [edges[:cut][sizes[:cut].argsort(stable=True)], edges[dangling[*edges.T]]]
            kept = left_in_paths
            step(note=f"{int(kept.sum()):,} edges")
        order.append(_by_strength(gated, kept, signed_below, steps)[0])
        step()
    ranked = torch.cat(order)
    places = torch.zeros(graph.exists.shape)
    places[*ranked.T] = torch.arange(1, len(ranked) + 1) / len(ranked)
    return places


def _by_strength(
    gated: GatedLoss, kept: Bool[Tensor, "S R"], signed_below: int, steps: int
) -> tuple[Int[Tensor, "E 2"], Float[Tensor, " E"]]:
    """A circuit's edges, the weakest first, and the |scores| of these."""
    if not kept.any():
        return kept.nonzero(), torch.empty(0)
    edges, scores = gated.integrated(kept, [(i + 1) / steps for i in range(steps)])
    scores = scores.cpu()
    order = (scores if len(edges) <= signed_below else scores.abs()).argsort(stable=True)
    return edges[order], scores[order].abs()


IG_PRUNE = Method("ig-prune", ig_prune, additive=False)
