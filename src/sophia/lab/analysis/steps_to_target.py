"""Steps to a target loss: which budget ends there, and what is read between the budgets.

Only the ends of whole schedules count (see `speedup.py`): a loss that a long run passes on its way is not the
end of a run of that length. So the plain answer is the smallest budget whose runs end at the target or below,
and the finer one is read off the contender's own curve L(D) through its end losses, inside the budgets that
were trained and never beyond. Its interval holds every D for which L(D) is not established to differ from
the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sophia.lab.analysis.seed_noise import Ends, Estimate, NoiseByBudget
from sophia.lab.analysis.speedup import Bounds, Curve, crossings, curve_of, distance, over_shapes
from sophia.lab.analysis.totals import Row

__all__ = ["Reach", "reach"]


@dataclass(frozen=True)
class Reach:
    """Steps of one contender to the target, with an interval."""

    contender: str
    budget: int | None
    """The smallest budget whose runs end at the target or below, mean over seeds, none diverged."""
    steps: float | None
    """Read off its curve; 0 if the smallest budget is enough already, infinite if the largest is not; None
    without a curve.
    """
    low: float | None
    high: float | None
    first: int
    """Smallest and largest of its budgets with finished runs; 0 if there are none."""
    last: int

    @property
    def words(self) -> str:
        """The steps with their interval."""
        if self.steps is None or not self.last:
            return "—"
        value = self._bound(self.steps)
        if self.low is None or self.high is None:
            return f"{value} (no interval)"
        low, high = self._bound(self.low), self._bound(self.high)
        return value if low == high == value else f"{value} ({low} to {high})"

    def _bound(self, steps: float) -> str:
        if steps <= self.first:
            return f"{self.first:,} or fewer"
        return f"more than {self.last:,}" if steps > self.last else f"{steps:,.0f}"


def reach(rows: Sequence[Row], ends: Ends, contender: str, target: float, noise: NoiseByBudget) -> Reach:
    """Steps that the contender needs for a loss of ``target`` nats."""
    mine = sorted((r for r in rows if r.contender == contender and r.loss is not None), key=lambda r: r.steps)
    budget = next((r.steps for r in mine if r.loss is not None and r.loss <= target and not r.diverged), None)
    first, last = (mine[0].steps, mine[-1].steps) if mine else (0, 0)
    nothing = Reach(contender, budget, None, None, None, first, last)
    curve = curve_of(ends, contender, noise)
    seeds = {s for c, _, s in ends if c == contender}
    if isinstance(curve, str) or not any(
        all((contender, b, s) in ends for b in curve.budgets) for s in seeds
    ):
        return nothing
    # Here nothing cancels what a seed does to all budgets alike, so the variance is taken at its largest.
    noise = replace(noise, linked=True)
    at = np.geomspace(curve.budgets[0], curve.budgets[-1], 80)

    def solve(shape: Curve) -> Bounds:
        gaps = [distance(ends, {}, contender, shape, float(steps), noise) for steps in at]
        return crossings(at, [_moved(gap, target) for gap in gaps])

    steps, low, high = over_shapes(curve, solve)
    return replace(nothing, steps=steps, low=low, high=high)


def _moved(gap: Estimate, by: float) -> Estimate:
    low = None if gap.low is None else gap.low + by
    high = None if gap.high is None else gap.high + by
    return replace(gap, value=gap.value + by, low=low, high=high)
