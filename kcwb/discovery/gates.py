"""A metric as a function of gates on edges, and what its gradients say of each edge.

A gate g on u -> v delivers g a_u + (1 - g) abl_u: 1 keeps the edge, 0 cuts it. All other edges are cut. The
**integrated gradient of a gate** in a circuit lets all its gates open together, from 0 (nothing) to 1 (the circuit):

    score(u -> v) = - integral over alpha of dM/dg at g = alpha

(positive: cutting hurts), here the mean over some alphas. By the chain rule the scores of a circuit's edges sum to what
it gains over nothing, M(empty) - M(circuit). Where attribution (`kcwb.discovery.attribution`) measures every edge in
the whole model, this measures it among the edges that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.masked import SoftRuns
from kcwb.models.forward import prompt_chunks
from kcwb.models.loading import Model
from kcwb.tasks.metrics import Loss

#: Stacks of all senders' outputs that one differentiated pass holds.
_COPIES = 12


class GatedLoss:
    """A metric on some prompts, of gates on any edges.

    Parameters
    ----------
    model, loss, ablation
        The model, the metric, and what a cut edge delivers.
    """

    def __init__(self, model: Model, loss: Loss, ablation: Ablation) -> None:
        self.graph, self._parts = model.graph, []
        for rows in prompt_chunks(model.network, loss.prompts.tokens, copies=_COPIES):
            part = loss.select(range(len(loss.prompts))[rows])
            runs = SoftRuns(model.network, part.prompts, ablation.values(part.prompts))
            self._parts.append((part, runs, part.total / loss.total))

    def __call__(
        self, edges: Int[Tensor, "E 2"], gates: Float[Tensor, " E"], kept: Bool[Tensor, "S R"]
    ) -> tuple[float, Float[Tensor, " E"]]:
        """The loss with these gates on the edges that the mask `kept` has, and its gradient by them."""
        total, gradient = 0.0, torch.zeros(len(edges), device=gates.device)
        for part, runs, share in self._parts:
            with torch.enable_grad():
                own = gates.detach().requires_grad_()
                value = share * part(runs.gated(edges, own, kept))
                (slope,) = torch.autograd.grad(value, own)
            total += float(value.detach())
            gradient += slope.float()
        return total, gradient

    def of(self, kept: Bool[Tensor, "S R"]) -> float:
        """The loss of a circuit."""
        return sum(share * float(part(runs.logits(kept))) for part, runs, share in self._parts)

    def integrated(
        self, kept: Bool[Tensor, "S R"], alphas: Sequence[float]
    ) -> tuple[Int[Tensor, "E 2"], Float[Tensor, " E"]]:
        """The edges of a circuit, and the integrated gradients of their gates."""
        edges = kept.nonzero()
        scores = torch.zeros(len(edges), device=self._parts[0][1].network.device)
        for alpha in alphas:
            scores -= self(edges, torch.full_like(scores, alpha), kept)[1] / len(alphas)
        return edges, scores
