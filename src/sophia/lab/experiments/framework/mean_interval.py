"""The mean of a few values and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import fmean

__all__ = ["mean_interval"]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 90% interval by Student's t, without bounds for fewer than two values.

    >>> [round(x, 3) for x in mean_interval([0.1, 0.2, 0.3])], mean_interval([1.0])
    ([0.2, 0.031, 0.369], (1.0, -inf, inf))
    """
    from scipy import stats

    mean = fmean(values)
    if len(values) < 2:
        return mean, -inf, inf
    half = float(stats.t.ppf(0.95, len(values) - 1)) * float(stats.sem(values))
    return mean, mean - half, mean + half
