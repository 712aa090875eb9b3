"""MEMIT (arXiv 2210.07229): many facts at once, spread over the MLPs of a range of layers.

1. For each request find z = h + δ as in ROME, h being the stream after the last layer of the range at the subject's
   last token.
2. For each layer of the range, from the first: K are the requests' keys in the model as changed so far (means over
   prefixes), R the part of z - h that is still missing, divided by the number of layers left; W_out gains
   (λC + K Kᵀ)⁻¹ K Rᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.covariance import covariances, whiten
from kcwb.editing.methods.base import EditMethod, Fit, Request
from kcwb.editing.methods.rome import DeltaSettings, all_contexts, optimise_delta
from kcwb.editing.partial_runs import make_rows, read_places
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, NotNegative, Positive
from kcwb.verbs import noun

#: Of a layer, the requests' keys there and what is to be added for them: the change of its down-projection.
Solving = Callable[[int, Float[Tensor, "n M"], Float[Tensor, "n D"]], Float[Tensor, "M D"]]


@noun
@dataclass(frozen=True)
class SpreadSettings(DeltaSettings):
    """What editors of a range of layers depend on; the clamp's scale is the norm of the stream.

    Attributes
    ----------
    spread
        How many layers share the change; the last of them is the edit's layer.
    """

    clamp: Positive = 0.75
    spread: Count = 3

    def layers(self, last: int) -> range:
        """The layers that are changed."""
        return range(max(0, last - self.spread + 1), last + 1)


@noun
@dataclass(frozen=True)
class MemitSettings(SpreadSettings):
    """What MEMIT depends on.

    Attributes
    ----------
    weight
        λ: how much C counts beside the requests' keys. The authors take 15,000 for GPT-2 XL and GPT-J; on SmolLM2-135M
        that leaves a single edit without effect, and 1,500 does not.
    ridge
        C, where it is of text, gains this share of tr(C)/d·I, as in ROME.
    """

    weight: Positive = 1_500.0
    ridge: NotNegative = 0.01


def memit(
    model: Model, requests: Sequence[Request], layer: int, settings: MemitSettings, seed: int, progress: Progress
) -> Fit:
    """Fit a MEMIT edit of all requests; `layer` is the last that is changed. The steps are the module's."""
    about: dict[int, Tensor] = {}

    def solve(number: int, keys: Tensor, change: Tensor) -> Tensor:
        if settings.covariance == "text" and not about:
            found = covariances(model, settings.layers(layer), seed=seed, progress=progress)
            about.update({one: c.matrix for one, c in found.items()})
        c = about.get(number, torch.eye(keys.shape[1], device=model.device))
        return spread_change(c, keys, change, settings.weight, settings.ridge if number in about else 0.0)

    return spread_edit(model, requests, layer, settings, seed, progress, "MEMIT", solve)


def spread_edit(
    model: Model, requests: Sequence[Request], layer: int, settings: SpreadSettings, seed: int, progress: Progress,
    what: str, solve: Solving,
) -> Fit:  # fmt: skip
    """The module's steps, with any change of a layer for its share of what is missing."""
    network = model.network
    layers = settings.layers(layer)
    contexts = all_contexts(model, requests, settings.prefixes, seed)
    prompts = make_rows(model, [(one.wanted, one.template) for one in requests])
    # 1. the wanted stream of each request
    before = read_places(network, prompts.tokens, prompts.subjects, [layer])[layer].after.float()
    found, losses, objectives = [], [], []
    with track(progress, len(requests), what) as step:
        for i, (request, stream) in enumerate(zip(requests, before, strict=True)):
            delta, steps = optimise_delta(
                model, contexts[i], request.wanted, layer, stream.norm(), settings, False, what
            )
            found.append(stream + delta)
            losses += [{"request": i, **record} for record in steps]
            objectives.append(steps[-1]["loss"])
            step(note=request.fact.subject)
    wanted = torch.stack(found)
    # 2. layer by layer, its share of what is still missing
    prefixed = make_rows(
        model, [(one.wanted, text) for one, texts in zip(requests, contexts, strict=True) for text in texts]
    )
    deltas: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    for left, number in zip(range(len(layers), 0, -1), layers, strict=True):
        all_keys = read_places(network, prefixed.tokens, prefixed.subjects, [number], deltas)[number].key
        kept[number] = all_keys.float().unflatten(0, (len(requests), -1)).mean(1)
        missing = wanted - read_places(network, prompts.tokens, prompts.subjects, [layer], deltas)[layer].after.float()
        deltas[number] = solve(number, kept[number], missing / left)
    return Fit(deltas, losses, max(objectives), contexts, kept[layer], wanted, kept, {"layers": list(layers)})


def spread_change(
    matrix: Float[Tensor, "M M"], keys: Float[Tensor, "n M"], change: Float[Tensor, "n D"], weight: float, ridge: float
) -> Float[Tensor, "M D"]:
    """(λC + K Kᵀ)⁻¹ K Rᵀ, oriented as W_out, the ridge having been added to C.

    As C⁻¹K (λI + Kᵀ C⁻¹ K)⁻¹ Rᵀ, which is the same (Woodbury) and solves with C as ROME does.
    """
    k = keys.double()
    white = whiten(matrix, k.T, ridge)
    inner = k @ white + weight * torch.eye(len(k), device=k.device, dtype=k.dtype)
    return (white @ torch.linalg.solve(inner, change.double())).to(change.dtype)


MEMIT = EditMethod("memit", memit, MemitSettings, many=True)
