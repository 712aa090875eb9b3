"""MEMIT (arXiv 2210.07229): many facts at once, spread over the MLPs of a range of layers.

1. For each request find z = h + δ as in ROME, h being the stream after the last layer of the range at the subject's
   last token.
2. For each layer of the range, from the first: K are the requests' keys in the model as changed so far (means over
   prefixes), R the part of z - h that is still missing, divided by the number of layers left; W_out gains
   (λC + K Kᵀ)⁻¹ K Rᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from kcwb.settings import Count, Positive
from kcwb.verbs import noun


@noun
@dataclass(frozen=True)
class MemitSettings(DeltaSettings):
    """What MEMIT depends on; the clamp's scale is the norm of the stream.

    Attributes
    ----------
    spread
        How many layers share the change; the last of them is the edit's layer.
    weight
        λ: how much C counts beside the requests' keys. The authors take 15,000 for GPT-2 XL and GPT-J; on SmolLM2-135M
        that leaves a single edit without effect, and 1,500 does not.
    """

    clamp: Positive = 0.75
    spread: Count = 3
    weight: Positive = 1_500.0


def memit(
    model: Model,
    requests: Sequence[Request],
    layer: int,
    settings: MemitSettings,
    seed: int,
    progress: Progress = False,
) -> Fit:
    """Fit a MEMIT edit of all requests; `layer` is the last that is changed. The steps are the module's."""
    network = model.network
    layers = range(max(0, layer - settings.spread + 1), layer + 1)
    contexts = all_contexts(model, requests, settings.prefixes, seed)
    prompts = make_rows(model, [(one.wanted, one.template) for one in requests])
    # 1. the wanted stream of each request
    before = read_places(network, prompts.tokens, prompts.subjects, [layer])[layer].after.float()
    found, losses, objectives = [], [], []
    with track(progress, len(requests), "MEMIT") as step:
        for i, (request, stream) in enumerate(zip(requests, before, strict=True)):
            delta, steps = optimise_delta(
                model, contexts[i], request.wanted, layer, stream.norm(), settings, False, "MEMIT"
            )
            found.append(stream + delta)
            losses += [{"request": i, **record} for record in steps]
            objectives.append(steps[-1]["loss"])
            step(note=request.fact.subject)
    wanted = torch.stack(found)
    # 2. layer by layer, its share of what is still missing
    about = {}
    if settings.covariance == "text":
        about = {one: c.matrix for one, c in covariances(model, layers, seed=seed, progress=progress).items()}
    prefixed = make_rows(
        model, [(one.wanted, text) for one, texts in zip(requests, contexts, strict=True) for text in texts]
    )
    deltas: dict[int, Tensor] = {}
    keys = torch.empty(0)
    for left, number in zip(range(len(layers), 0, -1), layers, strict=True):
        all_keys = read_places(network, prefixed.tokens, prefixed.subjects, [number], deltas)[number].key
        keys = all_keys.float().unflatten(0, (len(requests), -1)).mean(1)
        missing = wanted - read_places(network, prompts.tokens, prompts.subjects, [layer], deltas)[layer].after
        c = about.get(number, torch.eye(keys.shape[1], device=model.device))
        ridge = settings.ridge if number in about else 0.0
        deltas[number] = spread_change(c, keys, missing / left, settings.weight, ridge).to(network.dtype)
    return Fit(deltas, losses, max(objectives), contexts, keys, wanted, {"layers": list(layers)})


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
