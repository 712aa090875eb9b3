"""The referee's tests of numbers: against slow definitions, and by how often they are wrong on planted data."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from kcwb.evaluation.referee import hypotheses as module
from kcwb.evaluation.referee.hypotheses import beats, difference, equivalence, independence, minimal

ALPHA = 0.05


@pytest.fixture
def few(monkeypatch):
    """Fewer permutations and simulations: for what is asked many times."""
    monkeypatch.setattr(module, "_PERMUTATIONS", 199)
    monkeypatch.setattr(module, "_SIMULATIONS", 200)
    module._hsic_power.cache_clear()
    yield
    module._hsic_power.cache_clear()


def chance(n: int, share: float) -> list[float]:
    return [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]


# --- equivalence ---


@pytest.mark.parametrize("wins", range(13))
def test_equivalence_is_the_sum_over_binomial_tails(wins):
    n = 12
    found = equivalence([1.0] * wins + [-1.0] * (n - wins), np.zeros(n), ALPHA)
    beyond = [k for k in range(n + 1) if abs(k / n - 0.5) >= abs(wins / n - 0.5) - 1e-12]
    assert found.p_against == pytest.approx(min(1, sum(chance(n, 0.6)[k] for k in beyond)))
    assert found.p_for == pytest.approx(max(sum(chance(n, 0.6)[: wins + 1]), sum(chance(n, 0.4)[wins:])))
    assert found.effect == wins / n and found.low <= found.effect <= found.high


def test_facts_that_hardly_differ_count_half():
    own, full = np.array([1.0, 1.0, 0.02, -0.02]), np.zeros(4)
    assert equivalence(own, full, ALPHA).effect == 0.75
    assert equivalence(own, full, ALPHA, tie=0.05).effect == 0.75
    assert equivalence(np.array([1.0, 0.02, 0.02, 0.02]), full, ALPHA, tie=0.05).effect == 2.5 / 4
    same = equivalence(full, full, ALPHA)
    assert same.effect == 0.5 and same.p_against == 1.0


def test_that_a_circuit_is_equivalent_can_be_shown_with_enough_facts():
    half = np.arange(400) % 2 - 0.5
    assert equivalence(half, np.zeros(400), ALPHA).p_for < 0.001
    assert equivalence(half[:40], np.zeros(40), ALPHA).p_for > 0.05


def test_the_power_of_equivalence_is_how_often_it_finds_the_reference():
    generator, n = np.random.default_rng(0), 30
    found = [equivalence(np.where(generator.random(n) < 0.2, 1.0, -1.0), np.zeros(n), 0.01) for _ in range(200)]
    assert np.mean([one.p_against <= 0.01 for one in found]) == pytest.approx(found[0].power, abs=0.1)
    off = found[0].least
    reject = [equivalence(np.where(generator.random(n) < 0.5 - off, 1.0, -1.0), np.zeros(n), 0.01) for _ in range(200)]
    assert np.mean([one.p_against <= 0.01 for one in reject]) == pytest.approx(0.82, abs=0.09)


# --- independence ---


def slow_hsic(x, y) -> float:
    n = len(x)
    kernels = []
    for values in (x, y):
        apart = [abs(values[i] - values[j]) for i in range(n) for j in range(i)]
        width = float(np.median(apart))
        kernels.append(np.array([[math.exp(-((a - b) ** 2) / (2 * width**2)) for a in values] for b in values]))
    centre = np.eye(n) - 1 / n
    return float(np.trace(kernels[0] @ centre @ kernels[1] @ centre))


def test_independence_is_the_share_of_all_permutations_with_as_large_an_hsic():
    generator = np.random.default_rng(1)
    x = generator.normal(size=6)
    y = x + generator.normal(size=6)
    every = [slow_hsic(x, y[list(order)]) for order in permutations(range(6))]
    found = independence(x, y, ALPHA)
    assert found.p_against == pytest.approx(np.mean(np.array(every) >= slow_hsic(x, y) - 1e-9), abs=0.015)
    assert found.effect == pytest.approx(stats.spearmanr(x, y)[0]) and math.isnan(found.p_for)


def test_a_dependence_that_no_line_shows_is_found():
    x = np.linspace(-1, 1, 40)
    assert abs(stats.spearmanr(x, x**2)[0]) < 0.1 and independence(x, x**2, ALPHA).p_against < 0.001


def test_what_never_varies_depends_on_nothing():
    found = independence(np.full(20, 3.0), np.arange(20.0), ALPHA)
    assert found.p_against == 1.0 and math.isnan(found.least)
    assert independence(np.linspace(0, 0.01, 20), np.arange(20.0), ALPHA, tie=0.02).p_against == 1.0


def test_widths_are_each_samples_own():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(2, 30))
    y = y + x
    assert independence(1e6 * x, y, ALPHA).p_against == independence(x, y, ALPHA).p_against


# --- against random circuits ---


@pytest.mark.parametrize("wins", [0, 5, 15, 18, 20])
def test_beating_random_circuits_is_the_tails_of_a_binomial(wins):
    found = beats([True] * wins + [False] * (20 - wins), ALPHA)
    assert found.p_for == pytest.approx(sum(chance(20, 0.9)[wins:]))
    assert found.p_against == pytest.approx(sum(chance(20, 0.9)[: wins + 1]))
    assert found.effect == wins / 20


def test_one_idle_edge_makes_a_circuit_not_minimal():
    p = stats.binom(100, 0.9).cdf
    good, idle = minimal([1.0, 0.99, 1.0], 100, p([100, 99, 100]), ALPHA), minimal([1.0, 0.5], 100, p([100, 50]), ALPHA)
    assert good.effect == 1 and good.p_for == pytest.approx(stats.binom(100, 0.9).sf(98)) and good.p_against > 0.9
    assert idle.effect == 0.5 and idle.p_against < 1e-6 and idle.p_for > 0.5


# --- differences ---


def test_differences_are_tested_by_all_permutations():
    here, there = np.array([1.0, 3.0, 4.0]), np.array([0.0, 2.0, 2.5])
    pooled = np.concatenate([here, there])
    every = [pooled[list(order[:3])].mean() - pooled[list(order[3:])].mean() for order in permutations(range(6))]
    found = difference(here, there, ALPHA, paired=False)
    assert found.p_against == pytest.approx(np.mean(np.array(every) >= here.mean() - there.mean() - 1e-9))
    signs = [np.mean(np.array(s) * (here - there)) for s in product((1, -1), repeat=3)]
    found = difference(here, there, ALPHA, paired=True)
    assert found.p_against == pytest.approx(np.mean(np.array(signs) >= (here - there).mean() - 1e-9))
    assert found.effect == pytest.approx(np.mean(here - there))


def test_a_difference_below_the_margin_is_no_matter():
    generator = np.random.default_rng(0)
    near, far = generator.normal(0.02, 0.05, (2, 40)) + np.array([[0.0], [0.3]])
    found = difference(near, np.zeros(40), ALPHA, paired=True)
    assert found.p_for < 0.001
    found = difference(far, np.zeros(40), ALPHA, paired=True)
    assert found.p_for > 0.9 and found.p_against < 0.001


# --- how often they are wrong ---


def test_errors_are_as_rare_as_promised_and_power_is_what_is_said(few, capsys):
    """Type-I error and power on planted data, n = 30, at a level of .05, 120 samples each; printed as a table."""
    n, samples, generator = 30, 120, np.random.default_rng(0)

    def normal(rho: float):
        x, noise = generator.standard_normal((2, n))
        return rho * x + math.sqrt(1 - rho**2) * noise, x

    def signs(share: float):
        return np.where(generator.random(n) < share, 1.0, -1.0), np.zeros(n)

    def apart(mean: float):
        return mean + 0.3 * generator.standard_normal(n), 0.3 * generator.standard_normal(n)

    cases = {
        # at the edge of the claim; where the claim is false by the reference of the power
        "equivalence": (lambda of: equivalence(*signs(of), ALPHA), 0.6, 0.2),
        "independence": (lambda of: independence(*normal(of), ALPHA), 0.0, 0.5),
        "sufficiency": (lambda of: beats(generator.random(n) < of, ALPHA), 0.9, 0.5),
        "difference": (lambda of: difference(*apart(of), ALPHA, paired=False), 0.0, 0.25),
        "paired difference": (lambda of: difference(*apart(of), ALPHA, paired=True), 0.0, 0.25),
    }
    lines = ["", "question            type-I   power   power said"]
    for name, (test, edge, reference) in cases.items():
        under, beyond = ([test(of) for _ in range(samples)] for of in (edge, reference))
        wrong, right = (float(np.mean([one.p_against <= ALPHA for one in some])) for some in (under, beyond))
        said = float(np.mean([one.power for one in beyond]))
        lines.append(f"{name:18} {wrong:7.3f} {right:7.2f} {said:12.2f}")
        assert wrong <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / samples), name
        assert right == pytest.approx(said, abs=0.12), name
    with capsys.disabled():
        print("\n".join(lines))
