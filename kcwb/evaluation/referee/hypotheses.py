"""The referee's tests, of numbers alone: one value per fact, or per random circuit.

Those of *Hypothesis Testing the Circuit Hypothesis in LLMs* (arXiv 2410.13032), each asked in both directions, so that
an answer can be yes, no, or not shown: `p_against` is the p-value under the claim, `p_for` that under its opposite.
Where the paper's own code differs from its text this follows the text: non-equivalence counts on how many facts the
circuit does better (the code takes the mean difference of scores), the widths of HSIC's kernels are each sample's own
(the code takes one, of distances between the samples), and no p-value is 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from kcwb.statistics import holm, mean_interval, p_value

#: Of the share of facts on which the circuit does better than the model, and of a recovered share: what is no matter.
MARGIN = 0.1
#: What a circuit, or an edge, has to beat: nine of ten random ones.
QUANTILE = 0.9
#: How likely what `least` says is to be found.
_POWER = 0.8
_TIE = 1e-5  # of scores of about 1: rounding, in single precision
_PERMUTATIONS, _SIMULATIONS = 9999, 400


class Tested(NamedTuple):
    """What a test says.

    Attributes
    ----------
    effect, low, high
        The estimate, with its 95% interval.
    n
        How many values it is of.
    p_for, p_against
        The p-value under the claim's opposite, small if the claim holds; and under the claim.
    power, least
        The probability of finding, at level `alpha`, a claim wrong that is so by a stated reference; and by how much
        one must be wrong to be found in 80% of cases (NaN: by nothing that can be).
    """

    effect: float
    low: float
    high: float
    n: int
    p_for: float
    p_against: float
    power: float
    least: float


def equivalence(circuit: npt.ArrayLike, model: npt.ArrayLike, alpha: float, tie: float = _TIE) -> Tested:
    """Is the circuit as often better than the model as worse: |P(s_C > s_M) - 1/2| below the margin.

    The effect is the share of facts on which the circuit's score is the higher one, where those that differ by no more
    than `tie` count half; its interval is Wilson's. `p_against` is both tails of Binomial(n, 1/2 + margin) beyond what
    was seen, as in the paper; `p_for` the larger of two one-sided ones. Both take a half tie for what makes them
    larger. The reference of the power is a circuit that does better (or worse) on one fact in five.
    """
    own, full = np.asarray(circuit, float), np.asarray(model, float)
    n, ties = len(own), np.isclose(own, full, rtol=_TIE, atol=tie)
    wins = float(((own > full) & ~ties).sum() + ties.sum() / 2)
    towards = math.floor(wins) if wins > n / 2 else math.ceil(wins)
    wide, narrow = stats.binom(n, 0.5 + MARGIN), stats.binom(n, 0.5 - MARGIN)
    p_for = max(float(wide.cdf(math.ceil(wins))), float(narrow.sf(math.floor(wins) - 1)))

    def against(k: npt.NDArray) -> npt.NDArray:
        off = np.abs(k - n / 2)
        return np.minimum(1.0, wide.sf(np.ceil(n / 2 + off) - 1) + wide.cdf(np.floor(n / 2 - off)))

    counts = np.arange(n + 1)
    rejects = against(counts) <= alpha

    def power(off: float) -> float:
        return float(stats.binom.pmf(counts, n, 0.5 - off)[rejects].sum())

    interval = stats.binomtest(towards, n).proportion_ci(method="wilson")
    p_against = float(against(np.array([towards]))[0])
    least = _least(power, np.linspace(0.01, 0.5, 50))
    return Tested(wins / n, interval.low, interval.high, n, p_for, p_against, power(0.3), least)


def independence(
    complement: npt.ArrayLike, model: npt.ArrayLike, alpha: float, tie: float = _TIE, seed: int = 0
) -> Tested:
    """Are the scores of what is left without the circuit independent of the model's.

    Scores whose range is no more than `tie` are taken for one that never varies.

    By HSIC (Gretton et al. 2007) with Gaussian kernels, whose widths are the median distance within each sample, and
    9,999 permutations. The effect is Spearman's correlation, with the interval of Bonett and Wright (2000). That there
    is no dependence at all cannot be shown: `p_for` is NaN. The reference of the power is a correlation of .5 of two
    normal samples; power and `least` are simulated.
    """
    one, other = np.asarray(complement, float), np.asarray(model, float)
    n = len(one)
    alike = [float(np.ptp(x)) <= max(tie, _TIE * float(np.abs(x).max())) for x in (one, other)]
    if n < 4 or any(alike):  # what never varies depends on nothing
        return Tested(0.0, math.nan, math.nan, n, math.nan, 1.0, math.nan, math.nan)
    left, right = _centred(one), _kernel(other)
    generator, chance = np.random.default_rng(seed), np.empty(_PERMUTATIONS)
    for i in range(_PERMUTATIONS):
        order = generator.permutation(n)
        chance[i] = (left * right[np.ix_(order, order)]).sum()
    rho = float(np.corrcoef(stats.rankdata(one), stats.rankdata(other))[0, 1])
    half = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12)) + sign * half) for sign in (-1, 1))
    power, least = _hsic_power(n, alpha)
    return Tested(rho, low, high, n, math.nan, p_value(float((left * right).sum()), chance), power, least)


def _kernel(x: npt.NDArray) -> npt.NDArray:
    """Gaussian, as wide as the median distance between two of the values (any that differ, if most are alike)."""
    apart = np.abs(x[:, None] - x[None])
    between = apart[np.triu_indices(len(x), 1)]
    width = float(np.median(between)) or float(np.median(between[between > 0]))
    return np.exp(-(apart**2) / (2 * width**2))


def _centred(x: npt.NDArray) -> npt.NDArray:
    kernel = _kernel(x)
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()


@lru_cache(maxsize=64)
def _hsic_power(n: int, alpha: float) -> tuple[float, float]:
    """The power against a correlation of .5, and the least that is found in 80% of cases, of normal samples."""
    generator = np.random.default_rng(n)

    def statistic(rho: float) -> float:
        x, noise = generator.standard_normal((2, n))
        return float((_centred(x) * _kernel(rho * x + math.sqrt(1 - rho**2) * noise)).sum())

    null = [statistic(0.0) for _ in range(max(_SIMULATIONS, math.ceil(4 / alpha)))]
    limit = float(np.quantile(null, 1 - alpha))

    def power(rho: float) -> float:
        return float(np.mean([statistic(rho) > limit for _ in range(_SIMULATIONS)]))

    return power(0.5), _least(power, np.arange(0.1, 1.0, 0.05))


def beats(wins: npt.ArrayLike, alpha: float) -> Tested:
    """Does the circuit beat nine random ones of ten: sufficiency, and with complements partial necessity.

    The effect is the share that it beats, with Wilson's interval over random circuits; both p-values are the tails of
    Binomial(draws, .9). The reference of the power is a circuit that beats every other one.
    """
    won = np.asarray(wins, bool)
    n, k = len(won), int(won.sum())
    chance = stats.binom(n, QUANTILE)
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    p_for, p_against = float(chance.sf(k - 1)), float(chance.cdf(k))
    return Tested(k / n, interval.low, interval.high, n, p_for, p_against, *_found_below(n, alpha))


def minimal(exceeds: npt.ArrayLike, paths: int, p: npt.ArrayLike, alpha: float) -> Tested:
    """Is every edge more than a random one: from what `kcwb.minimality` found.

    The effect is the share of edges that are not superfluous, with Wilson's interval over edges. `p_against` is the
    smallest of the edges' p-values after Holm's correction; `p_for` the largest under their opposites, since all edges
    must be shown to be more. The reference of the power is one edge that matters as much as a random one.
    """
    shares, adjusted = np.asarray(exceeds, float), holm(p)
    n, good = len(shares), int((adjusted > 0.05).sum())
    interval = stats.binomtest(good, n).proportion_ci(method="wilson")
    p_for = float(stats.binom.sf(np.round(shares * paths) - 1, paths, QUANTILE).max())
    p_against = float(adjusted.min())
    return Tested(good / n, interval.low, interval.high, n, p_for, p_against, *_found_below(paths, alpha / n))


def _found_below(n: int, alpha: float) -> tuple[float, float]:
    """Of n draws: the power where every other one is beaten, and how far below nine of ten is found in 80% of cases."""
    counts = np.arange(n + 1)
    rejects = stats.binom.cdf(counts, n, QUANTILE) <= alpha

    def power(share: float) -> float:
        return float(stats.binom.pmf(counts, n, share)[rejects].sum())

    return power(0.5), _least(lambda off: power(QUANTILE - off), np.linspace(0.01, QUANTILE, 90))


def difference(here: npt.ArrayLike, there: npt.ArrayLike, alpha: float, *, paired: bool, seed: int = 0) -> Tested:
    """Is the mean here no more than the margin above that there: `p_for`; or is it above at all: `p_against`.

    By permutations (of signs where values are paired), 9,999 of them, or all there are; against the margin, of values
    here less the margin. The effect is the difference of means; its interval is the bootstrap's over facts, of
    unpaired ones Welch's. If the difference is surely above 0 and surely below the margin the claim holds: it does no
    matter. The reference of the power is a difference of .25, and it is that of a normal approximation.
    """
    one, other = np.asarray(here, float), np.asarray(there, float)
    n = min(len(one), len(other))
    if n < 2:
        return Tested(math.nan, math.nan, math.nan, n, math.nan, math.nan, math.nan, math.nan)

    def p(shift: float, side: str) -> float:
        values = (one - shift, other)
        if paired:
            values = (values[0] - values[1],)
        found = stats.permutation_test(
            values, np.mean if paired else _apart, permutation_type="samples" if paired else "independent",
            alternative=side, n_resamples=_PERMUTATIONS, vectorized=True, rng=np.random.default_rng(seed),
        )  # fmt: skip
        return float(found.pvalue)

    if paired:
        low, high = mean_interval(one - other, seed)
        error = float((one - other).std(ddof=1)) / math.sqrt(n)
    else:
        low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
        error = math.hypot(*(x.std(ddof=1) / math.sqrt(len(x)) for x in (one, other)))
    limit = stats.norm.isf(alpha)
    power = float(stats.norm.sf(limit - 0.25 / error)) if error else 1.0
    least = float(limit + stats.norm.ppf(_POWER)) * error
    effect = float(one.mean() - other.mean())
    return Tested(effect, float(low), float(high), n, p(MARGIN, "less"), p(0.0, "greater"), power, least)


def _apart(one: npt.NDArray, other: npt.NDArray, axis: int = -1) -> npt.NDArray:
    return one.mean(axis) - other.mean(axis)


def _least(power: Callable[[float], float], offs: npt.NDArray) -> float:
    """The first of some growing effects that is found in 80% of cases; NaN if none is."""
    i = bisect_left(offs, True, key=lambda off: power(float(off)) >= _POWER)
    return float(offs[i]) if i < len(offs) else math.nan
