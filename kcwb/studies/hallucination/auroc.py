"""AUROC within relations: of pairs of a wrong and a right prompt of one relation, and its bootstrap of two stages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int


def within_pairs(
    scores: Float[np.ndarray, "s N"], place: Int[np.ndarray, " N"], wrong: Bool[np.ndarray, " N"]
) -> dict[int, Float[np.ndarray, "s w g"]]:
    """Relation -> for every pair of a wrong and a right prompt: 1 if the wrong one scores higher, 1/2 if they tie."""
    found = {}
    for i in np.unique(place):
        bad, good = scores[:, (place == i) & wrong, None], scores[:, None, (place == i) & ~wrong]
        if bad.size and good.size:
            found[int(i)] = (bad > good) + 0.5 * (bad == good)
    return found


def pairs_auroc(pairs: Mapping[int, Float[np.ndarray, "s w g"]]) -> Float[np.ndarray, " s"]:
    """The share of pairs, over all relations."""
    return np.sum([one.sum((1, 2)) for one in pairs.values()], 0) / sum(one[0].size for one in pairs.values())


def resampled_aurocs(
    pairs: Mapping[int, Float[np.ndarray, "s w g"]], resamples: int, seed: int
) -> Float[np.ndarray, "b s"]:
    """AUROCs of resampled relations, of each of which prompts are resampled, wrong and right apart."""
    draw = np.random.default_rng(seed)
    values = list(pairs.values())
    sizes = np.array([one[0].size for one in values])
    total, weight = 0.0, np.zeros(resamples)
    for _ in values:
        took = draw.integers(len(values), size=resamples)
        for i, one in enumerate(values):
            rows = np.flatnonzero(took == i)
            bad, good = (draw.multinomial(k, np.full(k, 1 / k), len(rows)) / k for k in one.shape[1:])
            means = np.zeros((resamples, len(one)))
            means[rows] = np.einsum("bsg,bg->bs", np.tensordot(bad, one, (1, 1)), good)
            total = total + sizes[i] * means
            weight[rows] += sizes[i]
    return np.asarray(total) / weight[:, None]
