"""AlphaEdit (arXiv 2410.02355): MEMIT whose changes leave alone what other text uses and what earlier edits wrote.

1. and 2. as in MEMIT, but the change of a layer is P-projected: with P the projection on the null space of the keys of
   ordinary text, K_p the keys of the edits that are in the weights already, and the requests' own K and R, W_out gains

       Δ = (P (K_p K_pᵀ + K Kᵀ) + λI)⁻¹ P K Rᵀ,

   the smallest of |Kᵀ Δ - Rᵀ|² + |K_pᵀ Δ|² + λ|Δ|² over all Δ = P Δ.

No keys are exactly zero in some direction, so the null space is that of the smallest eigenvalues of C = E[k kᵀ]. The
authors' code takes those below 0.02, which fits the scale of the models that it is for. Here it is those that together
hold at most a given share of C's trace: of what ordinary keys are, squared, this much is not protected. `Edit.details`
says how many they are, and the largest of them.

Keys of an edit are those that it was made with, in the model as it was then: also ROME's and MEMIT's edits below are
left alone, in the layers that they change. Fine-tuning has none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.change import kept_keys
from kcwb.editing.covariance import covariances
from kcwb.editing.methods.base import EditMethod, Fit, Request
from kcwb.editing.methods.memit import SpreadSettings, spread_edit
from kcwb.editing.writing import text_digest, writer
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Natural, Positive, Share
from kcwb.verbs import noun


@noun
@dataclass(frozen=True)
class AlphaSettings(SpreadSettings):
    """What AlphaEdit depends on; with `covariance="identity"` nothing is known of other text, and P is I.

    Attributes
    ----------
    share
        Of C's trace, what the eigenvalues of the null space hold together at most. A small one protects more, and has
        room for fewer edits: as many as it has dimensions.
    weight
        λ: how much the size of the change counts. 10 in the authors' code; on SmolLM2-135M that leaves half of single
        edits without effect, and .1 none.
    prefixes, stop
        As in MEMIT and ROME; the authors take five prefixes, where ROME takes twenty.
    """

    prefixes: Natural = 5
    share: Share = 0.1
    weight: Positive = 10.0


def alphaedit(
    model: Model, requests: Sequence[Request], layer: int, settings: AlphaSettings, seed: int, progress: Progress
) -> Fit:
    """Fit an AlphaEdit edit of all requests; `layer` is the last that is changed. The steps are the module's."""
    network, told = model.network, {}

    def solve(number: int, keys: Tensor, change: Tensor) -> Tensor:
        earlier = [one.to(keys) for one in kept_keys(network, number)]
        space = None
        if settings.covariance == "text":
            space, largest = _null_space(model, number, settings, layer, seed, progress)
            told[number] = {"dimensions": space.shape[1], "of": len(space), "largest": largest}
        return projected_change(space, keys, change, torch.cat([keys[:0], *earlier]), settings.weight)

    fit = spread_edit(model, requests, layer, settings, seed, progress, "AlphaEdit", solve)
    earlier = sum(len(one) for one in kept_keys(network, layer))
    fit.details.update({"null_space": told, "earlier_keys": earlier})
    return fit


def null_space(matrix: Float[Tensor, "M M"], share: float) -> tuple[Float[Tensor, "M r"], float | None]:
    """The eigenvectors of the smallest eigenvalues that hold at most a share of the trace, and the largest of these.

    In float64, the smallest first; the largest is None where there are none.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min(0)
    n = int((values.cumsum(0) <= share * values.sum()).sum())
    return vectors[:, :n], float(values[n - 1]) if n else None


def projected_change(
    space: Float[Tensor, "M r"] | None, keys: Float[Tensor, "n M"], change: Float[Tensor, "n D"],
    earlier: Float[Tensor, "p M"], weight: float,
) -> Float[Tensor, "M D"]:  # fmt: skip
    """The module's Δ, oriented as W_out; `space` are the null space's orthonormal columns, None for all directions.

    With B = P [K, K_p] it is B (BᵀB + λI)⁻¹ [R, 0]ᵀ (Woodbury, and P P = P): a system of as many unknowns as there are
    keys.
    """
    both = torch.cat([keys, earlier]).double()
    projected = both if space is None else both @ space.to(both) @ space.to(both).T
    inner = projected @ projected.T + weight * torch.eye(len(both), device=both.device, dtype=both.dtype)
    sides = torch.cat([change.double(), change.new_zeros(len(earlier), change.shape[1]).double()])
    return (projected.T @ torch.linalg.solve(inner, sides)).to(change.dtype)


def _null_space(
    model: Model, number: int, settings: AlphaSettings, last: int, seed: int, progress: Progress
) -> tuple[Tensor, float | None]:
    """The null space of a layer's keys, from memory if it was asked for lately."""
    about = text_digest(model), writer(model), str(model.dtype), str(model.device), model.network.n_ctx
    wanted = *about, seed, number, settings.share
    if wanted not in _SPACES:
        found = covariances(model, settings.layers(last), seed=seed, progress=progress)
        _SPACES[wanted] = null_space(found[number].matrix, settings.share)
        while len(_SPACES) > _HELD:
            _SPACES.popitem(last=False)
    _SPACES.move_to_end(wanted)
    return _SPACES[wanted]


#: What was found lately, the latest last.
_SPACES: OrderedDict[tuple[object, ...], tuple[Tensor, float | None]] = OrderedDict()
_HELD = 8

ALPHAEDIT = EditMethod("alphaedit", alphaedit, AlphaSettings, many=True)
