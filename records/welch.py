"""Means of few seeds: standard deviation, confidence interval, Welch's t-test.

Student's t has no closed form at fractional degrees of freedom; its tail is half the regularised
incomplete beta function I_x(n/2, 1/2) at x = n / (n + t^2), by its continued fraction (Lentz's
method, DLMF 8.17.22), exact to about 1e-14.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = (math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                 + a * math.log(x) + b * math.log1p(-x))
    tiny, c, d = 1e-300, 1.0, 1 / (1 - (a + b) * x / (a + 1) or 1e-300)
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(fraction / before - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t."""
    half = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return half if t >= 0 else 1 - half


@functools.cache
def t_quantile(tail: float, freedom: float) -> float:
    """The t with P(T > t) = tail, 0 < tail < 0.5, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > tail:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return high


class Sample(NamedTuple):
    """A mean of n values with their standard deviation (n - 1); one value has none."""

    mean: float
    std: float | None
    n: int

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval; None for one value."""
        return (t_quantile(0.025, self.n - 1) * self.std / math.sqrt(self.n)
                if self.n > 1 else None)


def sample(values: Sequence[float]) -> Sample:
    """Mean and spread of values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Sample(statistics.fmean(values), spread, len(values))


class Welch(NamedTuple):
    """Test of "the first mean is lower than the second by more than the bar"."""

    difference: float  # second mean - first mean: how much lower the first is
    t: float
    freedom: float
    p: float  # one-sided


def welch(first: Sample, second: Sample, bar: float = 0.0) -> Welch | None:
    """Welch's t-test, one-sided; None unless both have two values and either any spread."""
    if min(first.n, second.n) < 2 or not (first.std or second.std):
        return None
    parts = first.std**2 / first.n, second.std**2 / second.n
    difference = second.mean - first.mean
    t = (difference - bar) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (first.n - 1) + parts[1] ** 2 / (second.n - 1))
    return Welch(difference, t, freedom, t_tail(t, freedom))
