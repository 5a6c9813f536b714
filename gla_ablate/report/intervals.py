"""A mean difference over seeds, and how far it can be trusted.

Seeds are paired: trials of one seed share batches and the initial weights that both have, so that what a seed does to
all of them drops out of their difference. An interval is Student's t over the seeds' differences, which takes them for
independent draws of a normal distribution; it speaks of one comparison, and of twenty one is expected to err.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from scipy import special

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean difference over n seeds and its 95 % confidence interval, which takes two seeds."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def tie(self) -> bool | None:
        """Whether the interval contains 0: the seeds don't tell the two apart. None without an interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def __neg__(self) -> Interval:
        """Of the same two the other way round."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Interval(-self.mean, low, high, self.n)


def interval(differences: Iterable[float]) -> Interval | None:
    """Of one difference a seed; None without any."""
    values = list(differences)
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = reach(n) * std
    return Interval(mean, mean - half, mean + half, n)


@functools.cache
def reach(n: int) -> float:
    """Half of an interval over `n` seeds, in standard deviations of their differences: 9.0 for 2, 2.5 for 3."""
    return float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) / math.sqrt(n)


def verdict(difference: Interval | None, mode: str, without: str = "no common seed") -> str:
    """What a point is against another, whose metric taken from its own is `difference`; `without` one, that word."""
    if difference is None:
        return without
    if difference.tie is None:
        return "one seed"
    if difference.tie:
        return "tie"
    return "better" if (difference.mean < 0) == (mode == "min") else "worse"
