"""Speed-up at equal loss: what the baseline needs for the contender's end loss, over what the contender used.

Only the ends of fully decayed runs enter (Wen, Hall, Ma, Liang, arXiv 2509.02046): early points of a longer
schedule are not comparable. The baseline's end losses at its budgets D give its curve

    L(D) = a D^-b + c

and the speed-up r solves L(r D) = l, with l the contender's loss at its largest budget D. Three budgets or
more determine b if they bend by more than the noise. Otherwise the curve goes through the measured points
with b = 1/3, near the published fits of language-model loss (Hoffmann et al. 2022: 0.28), and the interval
covers every b from 0 (straight in log D, which flatters a slower contender and denies a faster one) to 1.
Beyond the measured budgets the result is marked extrapolated.

The interval of r holds every r for which the contrast `l - L(r D)` is not established to differ from zero
(inversion of the test, as Fieller's): the noise of the curve is inside it, and r = 1 lies in it exactly
when the loss interval holds 0. It needs no bootstrap: it is the interval of `seed_noise.contrast`, with its
coverage, carried through a monotone curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from sophia.lab.analysis.seed_noise import Ends, Estimate, NoiseByBudget, contrast, plural

Vector = NDArray[np.float64]

REACH = 2.0
"""How far beyond the measured range a speed-up is still given as a number; further out only "more" or "less
than".
"""

B_RANGE = (0.02, 3.0)
"""Exponents b of the power law that are searched; published fits of language-model loss lie within 0.05 to
0.6.
"""


ASSUMED, STRAIGHT, STEEP = 1 / 3, 0.0, 1.0
"""The exponent b where the data do not determine it: of the value, and the two ends of the interval's
range.
"""


@dataclass(frozen=True)
class Curve:
    """The baseline's end loss as a function of its budget in steps: a D^-b + c, fitted or through the
    measured points.
    """

    budgets: tuple[int, ...]
    losses: tuple[float, ...]
    power: tuple[float, float, float] | None
    """(a, b, c) fitted to all budgets with D in units of the largest; None: pieces with an assumed b."""
    b: float

    @property
    def kind(self) -> str:
        """The curve in words."""
        if self.power is not None:
            return f"a D^-b + c fitted to {len(self.budgets)} budgets, b = {self.b:.2f}"
        through = f"a D^-b + c through {len(self.budgets)} budgets"
        return f"{through}, b = {self.b:.2f} assumed (0 to 1 in the interval)"

    def loss(self, steps: float) -> float:
        """End loss expected of a run of so many steps."""
        if self.power is not None:
            a, b, c = self.power
            return float(a * (steps / self.budgets[-1]) ** -b + c)
        return float(self.weights(steps) @ np.array(self.losses))

    def weights(self, steps: float) -> Vector:
        """How much each measured loss contributes to `loss(steps)`: exact for pieces, to first order for a
        fit.
        """
        d = np.array(self.budgets, dtype=np.float64) / self.budgets[-1]
        here = steps / self.budgets[-1]
        if self.power is not None:
            jacobian, row = _jacobian(d, self.power), _jacobian(np.array([here]), self.power)
            return np.asarray((row @ np.linalg.pinv(jacobian))[0], dtype=np.float64)
        # (D^-b - 1) / -b tends to log D for b -> 0, so the straight line needs no other formula.
        logs = np.log(np.append(d, here))
        scaled = np.expm1(-self.b * logs) / -self.b if self.b else logs
        x, at = scaled[:-1], scaled[-1]
        i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
        share = (at - x[i]) / (x[i + 1] - x[i])
        weights = np.zeros(len(x))
        weights[i], weights[i + 1] = 1 - share, share
        return weights


@dataclass(frozen=True)
class Ratio:
    """A speed-up with its interval and what limits it; above 1 the contender is cheaper than the baseline."""

    value: float
    low: float | None
    high: float | None
    floor: float
    """Below this the words are "less than"; the value is then 0 or below the floor."""
    ceiling: float
    """Above this the words are "more than"; the value may be infinite."""
    extrapolated: bool
    """True if the value lies outside the budgets at which the baseline was measured."""
    curve: str

    @property
    def verdict(self) -> str:
        """The word: "faster" or "slower" if the whole interval lies on that side of 1."""
        if self.low is None or self.high is None:
            return "not distinguishable"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "not distinguishable"


def curve_of(ends: Ends, name: str, noise: NoiseByBudget) -> Curve | str:
    """The curve of a contender, most often the baseline, through its mean end losses; a sentence that says
    why instead, if there is none.
    """
    means: dict[int, float] = {}
    for budget in sorted({b for c, b, _ in ends if c == name}):
        means[budget] = float(np.mean([y for (c, b, _), y in ends.items() if (c, b) == (name, budget)]))
    if len(means) < 2:
        return f"{name} has finished runs at {plural(len(means), 'budget')}; a speed-up needs two"
    budgets, losses = tuple(means), tuple(means.values())
    if any(later >= earlier for earlier, later in pairwise(losses)):
        return f"{name}'s loss does not fall from each budget to the next, so no budget belongs to a loss"
    seeds = min(sum((c, b) == (name, budget) for c, b, _ in ends) for budget in budgets)
    power = (
        _power_law(budgets, losses, [noise.at[b].of_a_run / sqrt(seeds) for b in budgets])
        if len(budgets) > 2
        else None
    )
    return Curve(budgets, losses, power, power[1] if power else ASSUMED)


def _jacobian(d: Vector, power: tuple[float, float, float]) -> Vector:
    a, b, _ = power
    return np.stack([d**-b, -a * d**-b * np.log(d), np.ones_like(d)], axis=1)


def _power_law(
    budgets: tuple[int, ...], losses: tuple[float, ...], errors: Sequence[float]
) -> tuple[float, float, float] | None:
    """Least squares a D^-b + c; None unless a and b are positive and b's standard error is below half of
    b.
    """
    d, y = np.array(budgets, dtype=np.float64) / budgets[-1], np.array(losses)

    def solve(b: float) -> tuple[Vector, float]:
        design = np.stack([d**-b, np.ones_like(d)], axis=1)
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        return solution, float(np.sum((design @ solution - y) ** 2))

    grid = np.geomspace(*B_RANGE, 60)
    best = int(np.argmin([solve(float(b))[1] for b in grid]))
    if best in (0, len(grid) - 1):
        return None  # at the edge the curve is a straight line in log D, or bends the wrong way
    bounds = (float(grid[best - 1]), float(grid[best + 1]))
    b = float(minimize_scalar(lambda b: solve(float(b))[1], bounds=bounds, method="bounded").x)
    a, c = (float(v) for v in solve(b)[0])
    if a <= 0 or c < 0:
        return None
    spread = float(np.linalg.norm(np.linalg.pinv(_jacobian(d, (a, b, c)))[1] * np.array(errors)))
    return (a, b, c) if spread < b / 2 else None


def speedup(ends: Ends, contender: str, baseline: str, curve: Curve, noise: NoiseByBudget) -> Ratio | None:
    """The contender's speed-up in steps at its largest budget with finished runs; None without such a run."""
    budgets = [b for c, b, _ in ends if c == contender]
    if not budgets:
        return None
    own = max(budgets)
    seeds = [s for c, b, s in ends if (c, b) == (contender, own)]
    paired = [s for s in seeds if all((baseline, b, s) in ends for b in curve.budgets)]
    if not paired:
        return None
    floor = min(curve.budgets[0] / own, 1 / REACH)
    ceiling = max(curve.budgets[-1] / own, REACH)
    ratios = np.unique(np.append(np.geomspace(floor / 1.3, ceiling * 1.3, 80), 1.0))

    def solve(shape: Curve) -> tuple[float, float | None, float | None]:
        return crossings(
            ratios,
            [distance(ends, {(contender, own): 1.0}, baseline, shape, float(r * own), noise) for r in ratios],
        )

    value, low, high = over_shapes(curve, solve)
    outside = value * own < curve.budgets[0] * (1 - 1e-9) or value * own > curve.budgets[-1] * (1 + 1e-9)
    return Ratio(value, low, high, floor, ceiling, outside, curve.kind)


def distance(
    ends: Ends,
    others: Mapping[tuple[str, int], float],
    name: str,
    curve: Curve,
    steps: float,
    noise: NoiseByBudget,
) -> Estimate:
    """A combination of end losses minus the loss that `name`, whose curve it is, has after so many steps;
    rises in the steps; with its interval.
    """
    weights = dict(others)
    for budget, w in zip(curve.budgets, curve.weights(steps), strict=True):
        if abs(w) > 1e-9:
            weights[name, budget] = weights.get((name, budget), 0.0) - float(w)
    estimate = contrast(ends, weights, noise)
    assert estimate is not None, "the caller made sure that all cells share a seed"
    if curve.power is None:
        return estimate
    # A fit's weights say how its loss moves with the noise, not what it is: put the fitted value in their
    # place.
    fitted = sum(w * y for w, y in zip(curve.weights(steps), curve.losses, strict=True))
    shift = fitted - curve.loss(steps)
    low = None if estimate.low is None else estimate.low + shift
    high = None if estimate.high is None else estimate.high + shift
    return replace(estimate, value=estimate.value + shift, low=low, high=high)


Bounds = tuple[float, float | None, float | None]
"""A value, and the two ends of its interval if there is one."""


def over_shapes(curve: Curve, solve: Callable[[Curve], Bounds]) -> Bounds:
    """What `solve` finds on the curve; where its exponent is assumed, the interval covers the others too."""
    value, low, high = solve(curve)
    for b in () if curve.power is not None else (STRAIGHT, STEEP):
        _, other_low, other_high = solve(replace(curve, b=b))
        if low is not None and other_low is not None and high is not None and other_high is not None:
            low, high = min(low, other_low), max(high, other_high)
    return value, low, high


def crossings(at: Vector, gaps: Sequence[Estimate]) -> Bounds:
    """Where gaps that rise along `at` pass zero, and between which places they are not established to lie on
    either side of it.
    """
    value = _crossing(at, np.array([g.value for g in gaps]))
    if any(g.low is None for g in gaps):
        return value, None, None
    return (
        value,
        _crossing(at, np.array([g.high for g in gaps], dtype=np.float64)),
        _crossing(at, np.array([g.low for g in gaps], dtype=np.float64), last=True),
    )


def _crossing(ratios: Vector, values: Vector, *, last: bool = False) -> float:
    """Where values rise through zero, linear between grid points in log r; 0 if always above, infinity if
    never.
    """
    above = values > 0
    if last:  # the last r that is not yet above: an interval with holes is closed to its hull
        i = len(ratios) - int(np.argmax(~above[::-1])) if not above.all() else 0
    else:
        i = int(np.argmax(above)) if above.any() else len(ratios)
    if i == 0:
        return 0.0
    if i == len(ratios):
        return float("inf")
    share = -values[i - 1] / (values[i] - values[i - 1])
    return float(exp(log(ratios[i - 1]) + share * (log(ratios[i]) - log(ratios[i - 1]))))
