"""Intervals against textbook numbers and by how often they hold; random sets of heads against what they promise."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
from scipy import stats

from kcwb.errors import CircuitError, DataError
from kcwb.models.graph import Graph
from kcwb.statistics import (
    chance_range,
    holm,
    matched_head_sets,
    mean_interval,
    p_value,
    proportion_interval,
    shared_by_chance,
    statistic_interval,
)

# --- proportions ---


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The roots of (p - hits/n)^2 = z^2 p (1 - p) / n."""
    z2, share = stats.norm.ppf(0.975) ** 2, hits / n
    low, high = sorted(np.roots([1 + z2 / n, -(2 * share + z2 / n), share**2]).real)
    return float(low), float(high)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(8, 8, 0.6756, 1.0), (0, 8, 0.0, 0.3244), (1, 1, 0.2065, 1.0), (7, 8, 0.5291, 0.9776), (4, 30, 0.0531, 0.2968)],
)
def test_a_proportion_has_wilsons_interval(hits, n, low, high):
    found = proportion_interval([1] * hits + [0] * (n - hits))
    assert found == pytest.approx((low, high), abs=1e-4)
    assert found == pytest.approx(wilson(hits, n), abs=1e-9)
    assert found == proportion_interval(np.arange(n) >= n - hits)  # booleans, in any order


def test_wilsons_interval_holds_as_often_as_it_says():
    """Exactly, over all outcomes of 8 facts: about 95% for every share."""
    covers = np.array([proportion_interval([1] * hits + [0] * (8 - hits)) for hits in range(9)])
    held = [
        stats.binom.pmf(np.flatnonzero((covers[:, 0] <= share) & (share <= covers[:, 1])), 8, share).sum()
        for share in np.linspace(0.02, 0.98, 97)
    ]
    assert np.mean(held) > 0.94 and min(held) > 0.8


@pytest.mark.parametrize("values", [[0.6], [0.5] * 30, [1.2], [0, 1, math.nan], [2, 0]])
def test_what_is_no_hit_or_miss_is_refused_as_a_proportion(values):
    with pytest.raises(DataError, match="0 or 1"):
        proportion_interval(values)


def test_a_weighted_proportion_has_the_interval_of_as_many_values_as_its_weights_are_worth():
    hits = [1, 1, 0, 1, 0]
    assert proportion_interval(hits, [0.3] * 5) == proportion_interval(hits)
    assert proportion_interval(hits, [2, 2, 2, 0, 0]) == pytest.approx(proportion_interval(hits[:3]))
    weights = np.array([1.0, 0.5, 0.5])  # worth 8 / 3 values, 3/4 of them hits
    low, high = proportion_interval([1, 1, 0], weights)
    z2, n = stats.norm.ppf(0.975) ** 2, 4 / 1.5
    roots = np.roots([1 + z2 / n, -(2 * 0.75 + z2 / n), 0.75**2])
    assert [low, high] == pytest.approx(sorted(roots.real))
    assert proportion_interval([1, 1], [1.0, 0.2])[1] == 1.0 and proportion_interval([0, 0], [1.0, 0.2])[0] == 0.0


# --- means ---


@pytest.mark.parametrize("values", [[], [0.6], [1.2], [1.0]])
def test_a_single_value_says_nothing_about_its_spread(values):
    assert np.isnan(mean_interval(values)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -1.7])
@pytest.mark.parametrize("n", [2, 30])
def test_values_that_are_all_alike_are_not_certainty(value, n):
    assert np.isnan(mean_interval([value] * n)).all()
    assert np.isnan(mean_interval(value * (1 + 1e-14 * np.arange(n)))).all()  # but for rounding


@pytest.mark.parametrize("seed", range(3))
def test_who_asks_decides_and_not_the_values(seed):
    """The same hits, as a proportion and as means over draws that happen to be whole; and moved out of 0 to 1."""
    hits = np.random.default_rng(seed).permutation([0.0] * 3 + [1.0] * 9)
    low, high = mean_interval(hits, seed)
    assert (low, high) != proportion_interval(hits)
    moved = mean_interval(hits * 3 - 5, seed)
    assert moved == pytest.approx((low * 3 - 5, high * 3 - 5))


@pytest.mark.parametrize(
    ("draw", "mean", "least"),
    [
        (lambda draw, n: draw.normal(size=n), 0.0, 0.91),
        (lambda draw, n: draw.beta(0.5, 0.5, size=n), 0.5, 0.91),
        (lambda draw, n: draw.exponential(size=n), 1.0, 0.85),
    ],
)
def test_a_means_interval_of_eight_values_holds_nearly_as_often_as_it_says(draw, mean, least):
    generator = np.random.default_rng(0)
    found = np.array([mean_interval(draw(generator, 8), seed) for seed in range(400)])
    held = ((found[:, 0] <= mean) & (mean <= found[:, 1])).mean()
    assert least <= held <= 0.985


def test_the_interval_lies_within_the_values_repeats_and_narrows():
    few, many = np.array([0.1, 0.9] * 4), np.array([0.1, 0.9] * 60)
    assert mean_interval(few, 3) == mean_interval(few, 3)
    (low, high), (low_many, high_many) = mean_interval(few, 3), mean_interval(many, 3)
    assert 0.1 <= low < low_many < 0.5 < high_many < high <= 0.9
    assert mean_interval([0.2, 0.8]) == pytest.approx((0.2, 0.8))  # two values: from one to the other


def test_a_means_interval_is_students_for_many_normal_values():
    values = np.random.default_rng(1).normal(size=200)
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected, abs=0.01)


def test_columns_are_resampled_together():
    """A ratio of columns that are proportional is the same in every resample; of shuffled ones it is not."""
    below = np.arange(1.0, 13.0)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis) / b.mean(axis)

    assert np.isnan(statistic_interval([3 * below, below], ratio)).all()
    low, high = statistic_interval([3 * below[::-1], below], ratio)
    assert low < 3 < high


def test_resamples_without_the_statistic_are_left_out():
    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.sum(axis) / b.sum(axis)

    low, high = statistic_interval([[1.0, 2.0, 0.0], [4.0, 4.0, 0.0]], ratio)
    assert 0.25 <= low < high <= 0.5


# --- shared by chance ---


def test_what_two_sides_share_by_chance_is_what_all_ways_to_deal_one_out_give():
    left, right = np.array([[1.0, 0.5, 0.0], [0.25, 0.5, 0.0]]), np.array([[0.75, 0.0, 0.5], [0.0, 1.0, 0.0]])
    ways = product(*map(permutations, right))
    every = [np.minimum(left, dealt).sum() for dealt in ways]
    found = shared_by_chance(left, right, 4000, np.random.default_rng(0))
    assert set(found.round(9)) == set(np.round(every, 9))
    assert found.mean() == pytest.approx(np.mean(every), abs=4 * np.std(every) / math.sqrt(4000))


def test_sets_share_as_many_as_the_hypergeometric_distribution_says():
    left, right = np.array([[1, 1, 1, 0], [0, 0, 1, 1]]), np.array([[0, 0, 1, 1], [0, 0, 0, 1]])
    found = shared_by_chance(left, right, 4000, np.random.default_rng(3))
    first, second = stats.hypergeom(4, 3, 2), stats.hypergeom(4, 2, 1)
    for shared in range(4):
        expected = sum(first.pmf(i) * second.pmf(shared - i) for i in range(shared + 1))
        assert np.mean(found == shared) == pytest.approx(expected, abs=0.03)


def test_what_is_alike_by_layers_alone_is_not_called_shared():
    generator = np.random.default_rng(0)
    busy = np.array([0.1, 0.9])[:, None]  # two circuits that both like the late layer
    values = []
    for _ in range(300):
        left, right = generator.random((2, 2, 8)) < busy
        values.append(p_value(float((left & right).sum()), shared_by_chance(left, right, 99, generator)))
    assert np.mean(np.array(values) <= 0.1) <= 0.13


# --- p ---


def test_p_counts_the_own_value_in_and_is_never_zero():
    assert p_value(9, range(9)) == 1 / 10
    assert p_value(0, range(9)) == 1
    assert p_value(5, range(9)) == (1 + 4) / 10
    assert p_value(0.1 + 0.2, [0.3, 0.1, 0.0]) == 2 / 4  # equal but for rounding
    assert p_value(math.inf, [math.inf, 1.0]) == 2 / 3 and p_value(-math.inf, [-math.inf, 1.0]) == 1


def test_what_is_not_a_number_has_no_p():
    assert math.isnan(p_value(math.nan, range(9))) and math.isnan(p_value(1.0, []))
    assert math.isnan(p_value(1.0, [math.nan])) and p_value(1.0, [math.nan, 0.0]) == 1 / 2


def test_the_range_of_chance_is_that_of_its_draws():
    assert chance_range(np.arange(101)) == pytest.approx((50, 2.5, 97.5))
    assert np.isnan(chance_range([])).all()


def test_holm_is_the_one_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.4]).tolist()[::2] == pytest.approx([0.8, 0.8]) and math.isnan(holm([math.nan])[0])


# --- random heads ---


def layers_of(heads) -> list[int]:
    return sorted(int(name[1:].split(".")[0]) for name in heads)


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (2, 2), (2, 4), (6, 1), (3, 5)])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_tested_heads_are_never_drawn_whatever_the_models_shape(shape, parallel):
    graph = Graph(*shape, parallel)
    every = [f"a{layer}.h{head}" for layer, head in product(*map(range, shape))]
    for size in range(1, len(every) // 2 + 1):
        for tested in (every[:size], every[-size:], every[::2][:size]):
            sets = matched_head_sets(graph, tested, 30, seed=size)
            assert sets and all(len(set(one)) == size and not set(one) & set(tested) for one in sets)
            assert len(set(map(tuple, sets))) == len(sets) and all(set(one) <= set(every) for one in sets)


@pytest.mark.parametrize("tested", [["a0.h0"], ["a0.h0", "a1.h1", "a1.h2"], ["a0.h1", "a2.h3"]])
def test_all_sets_of_the_same_layers_are_drawn_where_they_are_few(tested):
    graph, every = Graph(3, 4), [f"a{layer}.h{head}" for layer, head in product(range(3), range(4))]
    others = [name for name in every if name not in tested]
    expected = {some for some in combinations(others, len(tested)) if layers_of(some) == layers_of(tested)}
    sets = matched_head_sets(graph, tested, 200)
    assert set(map(tuple, sets)) == expected and len(sets) == len(expected)


def test_every_head_of_a_layer_has_its_turn():
    tested = ["a0.h2", "a2.h1", "a2.h5", "a2.h6"]
    sets = matched_head_sets(Graph(3, 20), tested, 400)
    assert len(sets) == 400 and all(layers_of(one) == [0, 2, 2, 2] for one in sets)
    counts = {name: sum(name in one for one in sets) for name in (f"a2.h{head}" for head in range(20))}
    assert {name for name, count in counts.items() if not count} == set(tested[1:])
    assert all(40 < count < 110 for count in counts.values() if count)  # 400 * 3 / 17 = 71


@pytest.mark.parametrize(
    ("tested", "expected"),
    [
        (["a1.h0", "a1.h1", "a1.h2"], {(0, 0, 1), (0, 1, 2), (1, 2, 2)}),  # one other in the layer
        ([f"a1.h{head}" for head in range(4)], {(0, 0, 0, 0), (0, 0, 0, 2), (0, 0, 2, 2), (0, 2, 2, 2), (2, 2, 2, 2)}),
        (["a2.h0", "a2.h1", "a2.h2", "a2.h3", "a1.h0"], {(1, 1, 1, 0, 0)}),  # below them, three and then two
        (["a0.h0", "a0.h1", "a0.h2", "a0.h3", "a1.h0"], {(1, 1, 1, 2, 2)}),
    ],
)
def test_where_a_layer_has_too_few_others_the_nearest_layers_stand_in(tested, expected):
    sets = matched_head_sets(Graph(3, 4), tested, 300)
    assert {tuple(layers_of(one)) for one in sets} == {tuple(sorted(one)) for one in expected}


def test_stand_ins_can_be_asked_from_more_than_a_layer():
    """Five of four heads each: the layer and both beside it hold 11 others."""
    sets = matched_head_sets(Graph(5, 4), ["a2.h0"], 50, least=8)
    assert {tuple(layers_of(one)) for one in sets} == {(1,), (2,), (3,)} and len(sets) == 11
    last = matched_head_sets(Graph(5, 4), ["a4.h0"], 50, least=4)
    assert {tuple(layers_of(one)) for one in last} == {(3,), (4,)} and len(last) == 7
    assert len(matched_head_sets(Graph(5, 4), ["a2.h0"], 50, least=50)) == 19


def test_heads_that_are_taken_are_not_drawn():
    sets = matched_head_sets(Graph(2, 4), ["a1.h0"], 50, taken=["a1.h0", "a1.h1", "a0.h0"])
    assert sorted(map(tuple, sets)) == [("a1.h2",), ("a1.h3",)]


def test_the_same_seed_gives_the_same_sets():
    graph, tested = Graph(4, 9), ["a3.h0", "a3.h1", "a2.h4"]
    assert matched_head_sets(graph, tested, 40, 3) == matched_head_sets(graph, tested, 40, 3)
    assert matched_head_sets(graph, tested, 40, 3) != matched_head_sets(graph, tested, 40, 4)
    assert matched_head_sets(graph, [*tested, tested[0]], 40, 3) == matched_head_sets(graph, tested, 40, 3)


def test_too_few_others_are_said_and_there_are_no_sets():
    with pytest.warns(UserWarning, match="5 of the model's 8 heads are taken"):
        assert matched_head_sets(Graph(2, 4), ["a0.h0", *(f"a1.h{i}" for i in range(4))], 9) == []
    assert matched_head_sets(Graph(2, 4), [], 9) == []
    assert matched_head_sets(Graph(1, 2), [], 9, taken=["a0.h0", "a0.h1"]) == []
    with pytest.raises(CircuitError):
        matched_head_sets(Graph(2, 4), ["a7.h0"], 9)
