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
from kcwb.editing.methods.rome import DeltaSettings, Fit, all_contexts, optimise_delta
from kcwb.editing.partial_runs import make_rows, read_places
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Positive
from kcwb.tasks.relations import Fact
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
    model: Model, facts: Sequence[Fact], targets: Sequence[str], templates: Sequence[str], layer: int,
    settings: MemitSettings, seed: int, progress: Progress = False,
) -> Fit:  # fmt: skip
    """Fit a MEMIT edit of all requests; `layer` is the last that is changed. See `kcwb.editing.edit.edit`."""
    network = model.network
    layers = range(max(0, layer - settings.spread + 1), layer + 1)
    asked = [Fact(fact.subject, target) for fact, target in zip(facts, targets, strict=True)]
    contexts = all_contexts(model, list(zip(asked, templates, strict=True)), settings.prefixes, seed)
    prompts = make_rows(model, list(zip(asked, templates, strict=True)))
    before = read_places(network, prompts.tokens, prompts.subjects, [layer])[layer].after.float()
    found, losses, ends = [], [], []
    with track(progress, len(asked), "MEMIT") as step:
        for i, (fact, stream) in enumerate(zip(asked, before, strict=True)):
            delta, steps = optimise_delta(
                model, contexts[i], fact.subject, fact.object, layer, stream.norm(), settings, False, what="MEMIT"
            )
            found.append(stream + delta)
            losses += [{"request": i, **record} for record in steps]
            ends.append(steps[-1]["loss"])
            step(note=fact.subject)
    wanted = torch.stack(found)
    about = {}
    if settings.covariance == "text":
        about = {one: c.matrix for one, c in covariances(model, layers, seed=seed, progress=progress).items()}
    prefixed = make_rows(model, [(fact, text) for fact, texts in zip(asked, contexts, strict=True) for text in texts])
    deltas: dict[int, Tensor] = {}
    keys = torch.empty(0)
    for left, number in zip(range(len(layers), 0, -1), layers, strict=True):
        all_keys = read_places(network, prefixed.tokens, prefixed.subjects, [number], deltas)[number].key
        keys = all_keys.float().unflatten(0, (len(asked), -1)).mean(1)
        missing = wanted - read_places(network, prompts.tokens, prompts.subjects, [layer], deltas)[layer].after
        c = about.get(number, torch.eye(keys.shape[1], device=model.device))
        ridge = settings.ridge if number in about else 0.0
        deltas[number] = spread_change(c, keys, missing / left, settings.weight, ridge).to(network.dtype)
    return Fit(deltas, losses, keys, wanted, max(ends), contexts, {"layers": list(layers)})


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
