"""What any circuits answer on the same facts: losses and hits of each fact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.masked import MaskedRuns
from kcwb.errors import KcwbError
from kcwb.models.loading import Model
from kcwb.models.memory import HeldPieces
from kcwb.parallel import on_each_core
from kcwb.tasks.metrics import Loss, answer_ranks, make_loss
from kcwb.tasks.prompts import KNOWN_RANK, Prompts


class Answered(NamedTuple):
    """Of each fact: its loss in each metric, and whether its answer is among the first ten."""

    losses: dict[str, Float[np.ndarray, " N"]]
    hits: Bool[np.ndarray, " N"]


def metrics_of(prompts: Prompts) -> tuple[str, ...]:
    """The metrics that are defined on all of some prompts: `logit_diff` needs another answer for each."""
    return ("nll", "logit_diff") if bool((prompts.foils >= 0).all()) else ("nll",)


class Scores:
    """Circuits on some prompts under an ablation; one that comes again is not run again."""

    def __init__(self, model: Model, prompts: Prompts, ablation: Ablation, metrics: Sequence[str]) -> None:
        self.model, self.prompts, self.metrics = model, prompts, tuple(metrics)

        def made(rows: slice) -> tuple[MaskedRuns, list[Loss]]:
            part = prompts.select(rows)
            runs = MaskedRuns(model.network, part, ablation.values(part))
            return runs, [make_loss(model, part, metric) for metric in metrics]

        self._parts = HeldPieces(model.network, prompts.tokens, made)
        self._known: dict[bytes, Answered] = {}

    def __call__(self, circuit: Circuit | Bool[Tensor, "S R"]) -> Answered:
        """What a circuit answers, run alone."""
        kept = circuit.kept if isinstance(circuit, Circuit) else circuit
        key = np.packbits(kept.numpy()).tobytes()
        if key not in self._known:
            self._known[key] = self._run(kept)
        return self._known[key]

    def each(self, circuits: Iterable[Circuit], step: Callable[[], None]) -> list[Answered]:
        """What many circuits answer, each run alone."""
        found = []
        for answered in on_each_core(self, circuits, self.model.device):
            found.append(answered)
            step()
        return found

    @property
    def model_alone(self) -> Answered:
        """The whole model: every edge is kept."""
        return self(self.model.graph.exists)

    @property
    def empty(self) -> Answered:
        """Nothing: every edge is cut."""
        return self(torch.zeros_like(self.model.graph.exists))

    def recovered(self, circuit: Circuit | Bool[Tensor, "S R"], metric: str) -> Float[np.ndarray, " N"]:
        """How much of what the model gains over nothing the circuit gains on each fact; the mean is faithfulness.

        A fact's gain over the facts' mean gain of the model: what a single fact gains may be about 0.
        """
        empty, full = self.empty.losses[metric], self.model_alone.losses[metric]
        return (empty - self(circuit).losses[metric]) / (empty - full).mean()

    def without_each(self, kept: Bool[Tensor, "S R"], edges: Int[Tensor, "E 2"]) -> tuple[Answered, list[Answered]]:
        """What a circuit answers, and what it answers without each of some edges."""

        def work(part: tuple[MaskedRuns, list[Loss]]) -> dict[int, Answered]:
            runs, losses = part
            return {i: _answered(runs.prompts, losses, logits) for i, logits in runs.without_each(kept, edges)}

        parts = self._parts.run(work)
        found = [self._joined([some[i] for some in parts]) for i in range(-1, len(edges))]
        return found[0], found[1:]

    def _run(self, kept: Bool[Tensor, "S R"]) -> Answered:
        return self._joined(self._parts.run(lambda part: _answered(part[0].prompts, part[1], part[0].logits(kept))))

    def _joined(self, parts: list[Answered]) -> Answered:
        losses = {metric: np.concatenate([one.losses[metric] for one in parts]) for metric in self.metrics}
        if not all(np.isfinite(some).all() for some in losses.values()):
            raise KcwbError("The logits of a run are not numbers: they overflow. Use float32.")
        return Answered(losses, np.concatenate([one.hits for one in parts]))


def _answered(prompts: Prompts, losses: Sequence[Loss], logits: Float[Tensor, "N A V"]) -> Answered:
    values = {loss.metric: loss.per_prompt(logits).double().cpu().numpy() for loss in losses}
    return Answered(values, (answer_ranks(logits, prompts) <= KNOWN_RANK).cpu().numpy())
