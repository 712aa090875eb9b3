"""What an editor is, and what editors share.

An editor finds a change of MLPs' down-projections that makes a model answer some requests otherwise, and touches no
weight meanwhile. It is one frozen record, `EditMethod`: its name, its function, the class of its settings, and how its
layer is found where nothing is known of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, NotNegative, Positive
from kcwb.tasks.relations import Fact
from kcwb.verbs import noun


class Request(NamedTuple):
    """What an editor is asked for: the template about the fact's subject is to be answered with the target."""

    fact: Fact
    target: str
    template: str

    @property
    def wanted(self) -> Fact:
        """The subject with its new object."""
        return self.fact.with_object(self.target)


@dataclass(frozen=True)
class Fit:
    """What an editor finds; no weight has been touched.

    Attributes
    ----------
    deltas
        Layer -> `[M, D]`, the change of the MLP's down-projection; at least float32, whatever the model has.
    losses
        One record per step (and request); at least `loss`.
    objective
        The loss after the last step, the worst of all requests.
    contexts
        Of each request the template, and the template with prefixes.
    keys, values
        `[n, M]`, `[n, D]`: k* and v* of each request; None where the method has none.
    kept
        Layer -> `[n, M]`: the keys whose outputs it changes, of each request; later AlphaEdit edits leave these alone.
    details
        What else is worth keeping.
    """

    deltas: dict[int, Float[Tensor, "M D"]]
    losses: list[dict[str, float]]
    objective: float
    contexts: list[list[str]]
    keys: Float[Tensor, "n M"] | None = None
    values: Float[Tensor, "n D"] | None = None
    kept: dict[int, Float[Tensor, "n M"]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


#: An editor's function: of the model, requests, the layer, its settings, the seed of what it draws, and progress.
Fitting = Callable[[Model, Sequence[Request], int, Any, int, Progress], Fit]


def a_third_down(model: Model) -> int:
    """The layer of an editor where a model's best one is not known: a third of the depth or a little less."""
    return round(0.3 * model.graph.n_layers)


@dataclass(frozen=True)
class EditMethod:
    """An editor.

    Attributes
    ----------
    name
        What `kcwb.edit` knows it by.
    function
        What finds the change.
    settings
        A frozen dataclass, marked `kcwb.verbs.noun`, whose annotations (`kcwb.settings`) say what may be given.
    many
        Whether it takes several requests at once.
    layer
        Its layer on a model of which nothing is known (`kcwb.editing.known` goes before).
    """

    name: str
    function: Fitting
    settings: type
    many: bool = False
    layer: Callable[[Model], int] = a_third_down


# --- going downhill ---


@noun
@dataclass(frozen=True)
class Descent:
    """What the search for a change depends on.

    Attributes
    ----------
    steps, lr
        Of Adam.
    clamp
        How large the change may become; what is measured, and by what, its editor says.
    stop
        The loss below which it ends.
    """

    steps: Count = 25
    lr: Positive = 0.5
    clamp: Positive = 4.0
    stop: NotNegative = 0.05


def descend(
    change: Tensor, settings: Descent, measure: Callable[[], dict[str, Tensor]], clamp: Callable[[], object],
    progress: Progress, what: str,
) -> list[dict[str, float]]:  # fmt: skip
    """Adam on a change, in place; `clamp` brings it back into its bounds. All that `measure` says, at every step."""
    optimiser = torch.optim.Adam([change], lr=settings.lr)
    losses: list[dict[str, float]] = []
    with torch.enable_grad(), track(progress, settings.steps, what) as step:
        for number in range(settings.steps + 1):
            seen = measure()
            losses.append({"step": number, **{name: float(value.detach()) for name, value in seen.items()}})
            value = losses[-1]["loss"]
            if not math.isfinite(value) or value < settings.stop or number == settings.steps:
                break
            optimiser.zero_grad()
            seen["loss"].backward()
            optimiser.step()
            with torch.no_grad():
                clamp()
            step(note=f"loss {value:.3f}")
    return losses
