"""Where a speed-up's interval lies on a bar: the numbers of the little picture beside each speed-up."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log

from sophia.lab.analysis.speedup import Ratio

LOWEST, HIGHEST = 0.4, 2.5
"""The ends of the bar; symmetric about 1 in the logarithm."""
WIDTH = 240.0
TICKS = tuple(round(WIDTH * log(v / LOWEST) / log(HIGHEST / LOWEST), 1) for v in (0.5, 1.0, 2.0))
"""Where 0.5, 1 and 2 lie."""


@dataclass(frozen=True)
class Bar:
    """Positions along `WIDTH`; an open end is drawn as an arrow."""

    value: float | None
    """None where only a bound is known."""
    low: float | None
    high: float | None
    open_low: bool
    open_high: bool


def bar(ratio: Ratio) -> Bar:
    """The bar of one speed-up."""
    known = ratio.floor <= ratio.value <= ratio.ceiling
    if ratio.low is None or ratio.high is None:
        return Bar(_at(ratio.value) if known else None, None, None, False, False)
    low, high = max(ratio.low, ratio.floor), min(ratio.high, ratio.ceiling)
    return Bar(
        _at(ratio.value) if known else None,
        _at(min(low, ratio.ceiling)),
        _at(max(high, ratio.floor)),
        ratio.low < max(ratio.floor, LOWEST),
        ratio.high > min(ratio.ceiling, HIGHEST),
    )


def _at(value: float) -> float:
    if value in (0.0, inf):
        return 0.0 if value == 0 else WIDTH
    return round(min(max(WIDTH * log(value / LOWEST) / log(HIGHEST / LOWEST), 0.0), WIDTH), 1)
