"""How sure is a number, and what does chance give: the package's intervals, p-values and random sets of heads.

What a number is, its caller says: a share of hits is a proportion (`proportion_interval`), anything else that is
averaged over facts, heads or edits is a mean (`mean_interval`). The values never decide.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import scipy

from kcwb.errors import DataError, warn
from kcwb.models.graph import Graph

_RESAMPLES, _BATCH_CELLS = 9999, 10**7
#: Numbers that differ by less than this share are equal: what differs is rounding.
_ROUNDING = 1e-9
#: As many draws in a row, times the sets found, without a new one say that there are no more (of m sets that are
#: equally likely a last one would be missed with probability e^-10).
_MISSES = 10


# --- intervals ---


def proportion_interval(hits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion.

    Parameters
    ----------
    hits
        One value per fact (or head, edge, ...): true or false, 0 or 1. They are taken to be drawn independently.
    weights
        How much each counts in the share; None for all alike. The interval is then that of Kish's effective number of
        values, (sum of weights)^2 / sum of their squares.

    Returns
    -------
    tuple
        Low and high; NaN for no values. Eight hits of eight give .68 to 1: that all are alike is not certainty.

    Raises
    ------
    DataError
        If a value is neither 0 nor 1: a mean of shares is no proportion.
    """
    values = np.asarray(hits, dtype=float)
    if not len(values):
        return math.nan, math.nan
    if not np.isin(values, (0.0, 1.0)).all():
        raise DataError("A proportion is a share of hits, each of which is 0 or 1. Of other values take the mean.")
    if weights is None or np.ptp(counts := np.asarray(weights, dtype=float)) == 0:
        found = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    n, share, z = counts.sum() ** 2 / (counts**2).sum(), np.average(values, weights=counts), scipy.stats.norm.ppf(0.975)
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float(max(0, middle - half) / (1 + z**2 / n)), float(min(1, (middle + half) / (1 + z**2 / n)))


def mean_interval(values: npt.ArrayLike, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean, see `statistic_interval`: one value per fact (or chain, edit, ...)."""
    return statistic_interval([values], np.mean, seed)


def statistic_interval(
    columns: Sequence[npt.ArrayLike], statistic: Callable[..., npt.ArrayLike], seed: int = 0
) -> tuple[float, float]:
    """The 95% bootstrap interval of a statistic of one or several columns, whose rows are resampled together.

    The percentile bootstrap (`scipy.stats.bootstrap`, 9,999 resamples) with the percentiles widened to what Student's t
    would take of n values (Hesterberg 2015, arXiv 1411.5279, section 4.3): plain percentiles of 8 values are those of a
    spread that is too small by sqrt(7/8), and of a normal curve. The interval stays within the range of the values.

    Parameters
    ----------
    columns
        Each with one value per unit that was drawn (a fact, a relation, an edit): units are what is resampled.
    statistic
        Of the columns, along `axis`; such as a mean, or a ratio of means.
    seed
        Of the resamples.

    Returns
    -------
    tuple
        Low and high. NaN for fewer than two units, and where no resample differs from another: values that are all
        alike have shown no spread, which is not to say that there is none. Resamples in which the statistic is not
        defined are left out.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    n = len(arrays[0])
    if n < 2:
        return math.nan, math.nan
    tail = scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.025, n - 1))
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # where the statistic is not defined
        found = scipy.stats.bootstrap(
            arrays, statistic, n_resamples=_RESAMPLES, batch=max(1, _BATCH_CELLS // n), paired=True, vectorized=True,
            method="percentile", rng=np.random.default_rng(seed),
        ).bootstrap_distribution  # fmt: skip
    found = found[np.isfinite(found)]
    if not len(found) or np.ptp(found) <= _ROUNDING * np.abs(found).max():
        return math.nan, math.nan
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def resample_counts(n: int, draws: int, seed: int) -> npt.NDArray[np.int64]:
    """How often each of some bootstrap resamples takes each of n units, `[draws, n]`.

    For what is no statistic of columns, such as the circuit of some facts, so that `scipy.stats.bootstrap` cannot take
    it: a mean over the units of a resample is their values' product with these counts, over n.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)


# --- against chance ---


def p_value(own: float, chance: npt.ArrayLike) -> float:
    """The share of draws, the own value counted in, that are as large as it or larger: one-sided, and never 0.

    (1 + draws at least as large) / (1 + draws). For what is small turn the signs round. NaN if the own value is, or if
    there is no draw.
    """
    drawn = np.asarray(chance, dtype=float)
    drawn = drawn[~np.isnan(drawn)]
    if math.isnan(own) or not len(drawn):
        return math.nan
    least = own - _ROUNDING * max(1.0, abs(own)) if math.isfinite(own) else own
    return float((1 + (drawn >= least).sum()) / (1 + len(drawn)))


def holm(p: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """p-values after Holm's correction (Holm 1979) over those that are not NaN, in their order."""
    values = np.asarray(p, float)
    some = np.flatnonzero(~np.isnan(values))
    order = some[np.argsort(values[some], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    found = np.full(len(values), math.nan)
    found[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return found


def chance_range(chance: npt.ArrayLike) -> tuple[float, float, float]:
    """Mean of the draws and ends of their middle 95%: where chance falls, not an interval of its mean. NaN for none."""
    drawn = np.asarray(chance, dtype=float)
    if not len(drawn):
        return math.nan, math.nan, math.nan
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(drawn.mean()), float(low), float(high)


def shared_by_chance(
    left: npt.ArrayLike, right: npt.ArrayLike, draws: int, generator: np.random.Generator
) -> npt.NDArray[np.number]:
    """How much of some heads two sides share when the right one's weights are dealt out at random, `[draws]`.

    Both are `[layers, heads]`, and a weight stays in its layer: connected circuits of whatever task like some layers
    more than others. Shared is the smaller of both weights of each head, summed. Weights of 1 and 0 alone are sets, of
    which this is the number of common members.
    """
    a, b = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    if np.isin([a, b], (0.0, 1.0)).all():
        counts = a.sum(1).astype(int), (1 - a).sum(1).astype(int), b.sum(1).astype(int)
        return generator.hypergeometric(*counts, (draws, len(a))).sum(1)
    return np.minimum(a, generator.permuted(np.tile(b, (draws, 1, 1)), axis=2)).sum((1, 2))


def matched_head_sets(
    graph: Graph, heads: Iterable[str], draws: int, seed: int = 0, *, least: int = 1, taken: Iterable[str] = ()
) -> list[list[str]]:
    """Random sets of heads to compare some heads with: as many, of the same layers, none of them among the tested.

    A late head moves any answer more than an early one, so that sets are matched by layer. Each tested head is stood in
    for by one of its own layer. Where a layer has too few others for that, stand-ins come from the nearest layers: all
    together they are as few layers away as can be. Which of the possible stand-ins they are is random.

    Parameters
    ----------
    graph, heads
        The heads that are tested. None of them is ever drawn.
    draws
        How many sets. No two are the same; where fewer can be made there are as many as can, so that a `p_value` from
        them is not below one in that number.
    seed
        Of the draws.
    least
        From how many others a stand-in is chosen: it may be of any of the fewest nearest layers that hold so many. With
        1 that is the head's own layer (if it has another).
    taken
        Further heads that are not drawn, such as those with a role.

    Returns
    -------
    list
        Sets of names, in the graph's order; empty, with a warning, if fewer heads are left than would be drawn.
    """
    tested = list(dict.fromkeys(heads))
    if not tested:
        return []
    out = {*tested, *taken}
    free = [name for name in graph.sender_names if name not in out and graph.node(name).kind == "head"]
    if len(free) < len(tested):
        warn(
            f"{len(out)} of the model's {graph.n_layers * graph.n_heads} heads are taken: too few are left to draw "
            f"{len(tested)} others. There are no random heads to compare with."
        )
        return []
    layers, others = (np.array([graph.node(name).layer for name in names], dtype=int) for names in (tested, free))
    away = np.abs(layers[:, None] - others)
    allowed = np.sort(away, axis=1)[:, min(least, len(free)) - 1, None]
    beyond = np.maximum(0, away - allowed)
    generator, found, misses = np.random.default_rng(seed), {}, 0
    while len(found) < draws and misses <= _MISSES * (1 + len(found)):
        # the fewest layers beyond what is allowed; among such sets, that of the smallest sum of random numbers
        order = generator.random(len(free)) / (1 + len(tested))
        chosen = tuple(np.sort(scipy.optimize.linear_sum_assignment(beyond + order)[1]).tolist())
        misses = misses + 1 if chosen in found else 0
        found[chosen] = None
    return [[free[i] for i in chosen] for chosen in found]
