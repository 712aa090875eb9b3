"""Fine-tuning of one MLP's down-projection on one fact: the baselines FT-M and FT-L.

FT-M minimises the cross-entropy of the target's tokens, each predicted at its own position (masked to the target).
FT-L, the variant of ROME's authors, reads all of the target's tokens at the last position of the prompt. Both take
steps of Adam and, after each, clamp every weight's change to ±`clamp` (an L∞ ball). Nothing of the model is touched
while they do: the changed weights are a tensor of their own, and only what they reach is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kcwb.editing.methods.rome import Fit
from kcwb.editing.partial_runs import Rows, answer_logits, answer_nll, make_rows, make_tail
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, NotNegative, Positive
from kcwb.tasks.relations import Fact
from kcwb.verbs import noun


@noun
@dataclass(frozen=True)
class TuningSettings:
    """What fine-tuning depends on.

    Attributes
    ----------
    steps, lr
        Of Adam on the down-projection.
    clamp
        The largest change of any weight.
    stop
        The loss below which it ends.
    """

    steps: Count = 25
    lr: Positive = 5e-4
    clamp: Positive = 2e-3
    stop: NotNegative = 0.01


def fine_tune(
    model: Model, fact: Fact, target: str, template: str, layer: int, settings: TuningSettings, *, at_end: bool,
    progress: Progress = False,
) -> Fit:  # fmt: skip
    """Fit FT-M, or with `at_end` FT-L; parameters as in `kcwb.editing.edit.edit`."""
    network = model.network
    rows = make_rows(model, [(Fact(fact.subject, target), template)])
    read = _at_end(rows) if at_end else rows
    tail = make_tail(network, rows, layer, torch.zeros_like(rows.subjects))
    delta = torch.zeros(network.layers[layer].W_out.shape, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr)
    losses: list[dict[str, float]] = []
    with torch.enable_grad(), track(progress, settings.steps, "fine-tuning") as step:
        for number in range(settings.steps + 1):
            final = tail.run(tail.hidden @ delta.to(network.dtype))
            loss = answer_nll(answer_logits(network, tail, final, read), read).mean()
            value, largest = float(loss.detach()), float(delta.detach().abs().max())
            losses.append({"step": number, "loss": value, "nll": value, "norm": largest})
            if not math.isfinite(value) or value < settings.stop or number == settings.steps:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                delta.clamp_(-settings.clamp, settings.clamp)
            step(note=f"loss {value:.3f}")
    return Fit({layer: delta.detach().to(network.dtype)}, losses, None, None, losses[-1]["loss"], [[template]], {})


def _at_end(rows: Rows) -> Rows:
    """All answer tokens read at END."""
    ends: Tensor = rows.positions[:, :1].expand(rows.positions.shape)
    return rows._replace(positions=ends)
