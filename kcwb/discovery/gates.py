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
from kcwb.models.loading import Model
from kcwb.models.memory import HeldPieces
from kcwb.tasks.metrics import Loss

#: Stacks of all senders' outputs that one differentiated pass holds.
_COPIES = 12
_Piece = tuple[Loss, SoftRuns, float]  # the metric on some prompts, their runs, and their share of the whole


class GatedLoss:
    """A metric on some prompts, of gates on any edges.

    Parameters
    ----------
    model, loss, ablation
        The model, the metric, and what a cut edge delivers.
    """

    def __init__(self, model: Model, loss: Loss, ablation: Ablation) -> None:
        self.graph, self._device = model.graph, model.device

        def made(rows: slice) -> _Piece:
            part = loss.select(rows)
            runs = SoftRuns(model.network, part.prompts, ablation.values(part.prompts))
            return part, runs, part.total / loss.total

        self._parts = HeldPieces(model.network, loss.prompts.tokens, made, _COPIES, "gates")

    def __call__(
        self, edges: Int[Tensor, "E 2"], gates: Float[Tensor, " E"], kept: Bool[Tensor, "S R"]
    ) -> tuple[float, Float[Tensor, " E"]]:
        """The loss with these gates on the edges that the mask `kept` has, and its gradient by them."""

        def work(piece: _Piece) -> tuple[float, Tensor]:
            part, runs, share = piece
            with torch.enable_grad():
                own = gates.detach().requires_grad_()
                value = share * part(runs.gated(edges, own, kept))
                (slope,) = torch.autograd.grad(value, own)
            return float(value.detach()), slope.float()

        values, slopes = zip(*self._parts.run(work), strict=True)
        return sum(values), torch.stack(slopes).sum(0)

    def of(self, kept: Bool[Tensor, "S R"]) -> float:
        """The loss of a circuit."""
        return sum(self._parts.run(lambda piece: piece[2] * float(piece[0](piece[1].logits(kept)))))

    def integrated(
        self, kept: Bool[Tensor, "S R"], alphas: Sequence[float]
    ) -> tuple[Int[Tensor, "E 2"], Float[Tensor, " E"]]:
        """The edges of a circuit, and the integrated gradients of their gates."""
        edges = kept.nonzero()
        scores = torch.zeros(len(edges), device=self._device)
        for alpha in alphas:
            scores -= self(edges, torch.full_like(scores, alpha), kept)[1] / len(alphas)
        return edges, scores
