"""When is one provider faster than another? The statistical rule behind every verdict of a benchmark.

The providers are timed in rounds, each once a round and in random order, so that a drifting clock and other programs
affect all of them alike. A round gives one ratio: the median of the baseline's step times over the median of ours. The
verdict is about the median of these ratios, by its distribution-free confidence interval between two order statistics,
the one that belongs to the sign test (W. J. Conover, Practical Nonparametric Statistics, 3rd ed., 1999, section 3.2):
with B binomial (n, 1/2), the k-th smallest and the k-th largest of n ratios enclose the median with probability
1 - 2 P(B < k). It assumes no shape of the distribution, and outliers move it little; 95 % take 6 rounds at least. A
difference is claimed only where the interval leaves out 1. Several of ours are compared in one table, so the error
probability of 5 % is divided by their number (Bonferroni).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Rounds = Sequence[Sequence[float]]  # the step times of each round

ERROR_PROBABILITY = 0.05
NOTICED_DRIFT = 1.1
NOTICED_SPREAD = 1.25


@dataclass(frozen=True)
class Speedup:
    """The median ratio and its interval, whose ends are None where there are too few rounds."""

    ratio: float
    low: float | None
    high: float | None
    rounds: int


def _rank(count, error):
    """The largest k with 2 P(B < k) ≤ error, 0 if there is none."""
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if 2 * below > error:
            break
        rank += 1
    return rank


def rounds_needed(comparisons: int = 1) -> int:
    """The fewest rounds for which the interval exists."""
    return next(n for n in range(1, 100) if _rank(n, ERROR_PROBABILITY / comparisons))


def speedup(ours: Rounds, theirs: Rounds, comparisons: int = 1) -> Speedup:
    """How many times as fast as ``theirs`` ``ours`` is.

    Args:
        ours, theirs: for each round the step times in seconds; only rounds that both have count.
        comparisons: how many such verdicts are made at once.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs) if a and b]
    ratios = sorted(statistics.median(b) / statistics.median(a) for a, b in pairs)
    rank = _rank(len(ratios), ERROR_PROBABILITY / comparisons)
    low, high = (ratios[rank - 1], ratios[-rank]) if rank else (None, None)
    return Speedup(statistics.median(ratios), low, high, len(ratios))


def drift(providers: Sequence[Rounds]) -> float:
    """How much longer the last third of the rounds took than the first, over all providers; 1 with under 6 rounds.

    providers: for each its rounds, as in ``speedup``.
    """
    count = min((len(rounds) for rounds in providers), default=0)
    if count < 6:
        return 1.0
    series = []
    for rounds in providers:
        medians = [statistics.median(steps) for steps in rounds[:count]]
        middle = statistics.median(medians)
        series.append([median / middle for median in medians])
    together = [statistics.geometric_mean(values) for values in zip(*series)]
    third = count // 3
    return statistics.median(together[-third:]) / statistics.median(together[:third])
