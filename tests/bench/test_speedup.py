"""vit_fast/bench/speedup.py: what its intervals cover, on step times drawn by a fixed seed, and when none is given.

References: the binomial distribution counted by hand, and the true ratio, which the drawn times have.
"""

import random
import statistics

import pytest

from vit_fast.bench.speedup import drift, rounds_needed, speedup


def drawn(seed, rounds, ratio=1.0, noise=0.05, slowing=0.0, outliers=0.0):
    """(ours, theirs): rounds of a step; theirs take ``ratio`` times as long. Both slow down and meet other programs."""
    draw = random.Random(seed)
    ours, theirs = [], []
    for turn in range(rounds):
        level = 1 + slowing * turn / rounds
        for steps, factor in ((ours, 1.0), (theirs, ratio)):
            step = level * factor * draw.lognormvariate(0, noise)
            steps.append([step * (5 if draw.random() < outliers else 1)])
    return ours, theirs


def test_the_interval_lies_between_the_order_statistics_of_the_sign_test():
    """Of 10 rounds P(B < 2) = 11/1024, P(B < 3) = 56/1024: the second of each end at 5 %; the first at 5 % over 5."""
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 9.0]
    found = speedup([[1.0, 1.0, 7.0]] * 10, [[r, r, 0.1] for r in reversed(ratios)])
    assert (found.ratio, found.low, found.high, found.rounds) == (pytest.approx(1.45), 1.1, 1.8, 10)
    several = speedup([[1.0]] * 10, [[r] for r in ratios], comparisons=5)
    assert (several.low, several.high) == (1.0, 9.0)


def test_few_rounds_give_no_interval():
    assert rounds_needed() == 6 and rounds_needed(5) == 8
    assert speedup([[1.0]] * 5, [[2.0]] * 5).low is None and speedup([[1.0]] * 6, [[2.0]] * 6).low == 2.0
    assert speedup([[1.0]] * 3, [[2.11]] * 3).high is None
    assert speedup([[1.0]] * 8, [[2.0]] * 5 + [[]]).rounds == 5  # what one of them lacks does not count


@pytest.mark.parametrize("rounds", [6, 10, 40])
@pytest.mark.parametrize(
    "world", [{}, {"slowing": 2.0}, {"outliers": 0.2}, {"noise": 0.5, "slowing": -0.7, "outliers": 0.1}]
)
def test_equal_programs_are_called_different_at_most_once_in_twenty(rounds, world):
    """Whatever the machine does to both; 400 draws, of which 5 % may be wrong, and 3.5 % more by chance."""
    wrong = 0
    for seed in range(400):
        found = speedup(*drawn(seed, rounds, **world))
        wrong += found.low > 1 or found.high < 1
    assert wrong <= 0.085 * 400


@pytest.mark.parametrize("world", [{}, {"slowing": 2.0}, {"outliers": 0.1}])
def test_a_difference_of_a_tenth_is_found_in_forty_rounds(world):
    found = [speedup(*drawn(seed, 40, ratio=1.1, **world)) for seed in range(60)]
    assert sum(one.low > 1 for one in found) > 55 and not any(one.high < 1 for one in found)
    assert statistics.median(one.ratio for one in found) == pytest.approx(1.1, rel=0.01)
    slower = [speedup(*drawn(seed, 40, ratio=1 / 1.1, **world)) for seed in range(60)]
    assert sum(one.high < 1 for one in slower) > 55


def test_quotients_of_whole_medians_would_be_wrong_under_drift():
    """Of a machine that slows down, theirs was timed in the first three of six rounds: rounds are compared in pairs."""
    ours = [[1.0], [1.0], [2.0], [4.0], [4.0], [4.0]]
    assert speedup(ours, ours[:3]).ratio == 1.0


def test_drift_is_seen_and_noise_is_not():
    assert drift(drawn(0, 40, slowing=1.0)) == pytest.approx(1.5, rel=0.1)
    assert drift(drawn(0, 40, slowing=-0.5)) == pytest.approx(0.62, rel=0.1)
    assert drift(drawn(0, 40, outliers=0.1)) == pytest.approx(1.0, abs=0.05)
    assert drift(drawn(0, 5, slowing=9.0)) == drift([]) == 1.0
