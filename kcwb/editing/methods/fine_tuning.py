"""Fine-tuning of one MLP's down-projection on one fact: the baselines FT-M and FT-L.

FT-M minimises the cross-entropy of the target's tokens, each predicted at its own position (masked to the target).
FT-L, the variant of ROME's authors, reads all of the target's tokens at the last position of the prompt. Both take
steps of Adam and, after each, clamp every weight's change to ±`clamp` (an L∞ ball). Nothing of the model is touched
while they do: the changed weights are a tensor of their own, and only what they reach is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kcwb.editing.methods.base import Descent, EditMethod, Fit, Request, descend
from kcwb.editing.partial_runs import answer_logits, answer_nll, make_rows, make_tail
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import NotNegative, Positive
from kcwb.verbs import noun


@noun
@dataclass(frozen=True)
class TuningSettings(Descent):
    """What fine-tuning depends on: Adam is on the down-projection, `clamp` is the largest change of any weight."""

    lr: Positive = 5e-4
    clamp: Positive = 2e-3
    stop: NotNegative = 0.01


def fine_tune(
    model: Model, requests: Sequence[Request], layer: int, settings: TuningSettings, seed: int, progress: Progress,
    *, at_end: bool,
) -> Fit:  # fmt: skip
    """Fit FT-M, or with `at_end` FT-L."""
    network, (request,) = model.network, requests
    rows = make_rows(model, [(request.wanted, request.template)])
    read = rows._replace(positions=rows.positions[:, :1].expand(rows.positions.shape)) if at_end else rows
    tail = make_tail(network, rows, layer, torch.zeros_like(rows.subjects))
    delta = torch.zeros(network.layers[layer].W_out.shape, device=model.device, requires_grad=True)

    def measure() -> dict[str, torch.Tensor]:
        final = tail.run(tail.hidden @ delta.to(network.dtype))
        loss = answer_nll(answer_logits(network, tail, final, read), read).mean()
        return {"loss": loss, "nll": loss, "norm": delta.detach().abs().max()}

    losses = descend(
        delta, settings, measure, lambda: delta.clamp_(-settings.clamp, settings.clamp), progress, "fine-tuning"
    )
    return Fit({layer: delta.detach()}, losses, losses[-1]["loss"], [[request.template]])


FT_M = EditMethod("ft_m", partial(fine_tune, at_end=False), TuningSettings)
FT_L = EditMethod("ft_l", partial(fine_tune, at_end=True), TuningSettings)
