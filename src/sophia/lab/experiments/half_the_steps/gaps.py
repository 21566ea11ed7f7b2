"""The gap between T/2 steps of one and T steps of the other, over sizes, from the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10, sqrt

import numpy as np

from sophia.lab.analysis.seed_noise import Estimate, contrast, noise_by_budget
from sophia.lab.analysis.speedup import Ratio, curve_of, speedup
from sophia.lab.experiments.framework.records import Records

__all__ = ["BASELINE", "CONTENDER", "PAPER", "Gap", "Line", "gaps", "line"]

BASELINE, CONTENDER = "adamw", "sophia-g"
PAPER = {"125M": 125e6, "355M": 355e6, "770M": 770e6}
"""Parameters of the paper's GPT-2."""


@dataclass(frozen=True)
class Gap:
    """One size."""

    size: str
    parameters: float
    steps: int
    """T."""
    difference: Estimate
    """End loss of Sophia-G after T/2 steps minus that of AdamW after T, nats a token."""
    ratio: Ratio | None
    """The speed-up in steps at Sophia-G's largest budget; None if AdamW's curve gives none."""


def gaps(records: Records) -> list[Gap]:
    """Of every size whose runs at T and T/2 are there, the smallest first."""
    found = []
    for size in records.values("size"):
        rows = records.where(size=size)
        ends = {
            (r.case["contender"], r.case["steps"], r.case["seed"]): float(r.result["loss"])
            for r in rows
            if r.result["loss"] is not None
        }
        most = max(r.case["steps"] for r in rows)
        noise = noise_by_budget(ends)
        difference = contrast(ends, {(CONTENDER, most // 2): 1.0, (BASELINE, most): -1.0}, noise)
        if difference is None:
            continue
        curve = curve_of(ends, BASELINE, noise)
        ratio = None if isinstance(curve, str) else speedup(ends, CONTENDER, BASELINE, curve, noise)
        parameters = next(r.result["parameters"] for r in rows if r.result["parameters"] is not None)
        found.append(Gap(size, parameters, most, difference, ratio))
    return sorted(found, key=lambda g: g.parameters)


@dataclass(frozen=True)
class Line:
    """A straight line of the gap against log10 of the parameters, by least squares over the sizes."""

    slope: float
    offset: float
    spread: float
    """Standard deviation of the sizes around it, n - 2 degrees of freedom."""
    centre: float
    squares: float
    sizes: int

    def at(self, parameters: float) -> tuple[float, float, float]:
        """The gap expected of another size, with a 90% interval for it (Student's t, n - 2 degrees); it holds
        if the line is straight, which nothing here tests.
        """
        from scipy import stats

        x = log10(parameters)
        value = self.offset + self.slope * (x - self.centre)
        error = self.spread * sqrt(1 + 1 / self.sizes + (x - self.centre) ** 2 / self.squares)
        half = float(stats.t.ppf(0.95, self.sizes - 2)) * error if self.sizes > 2 else inf
        return value, value - half, value + half


def line(found: Sequence[Gap]) -> Line | None:
    """Through the sizes; None for fewer than three."""
    if len(found) < 3:
        return None
    x = np.log10([g.parameters for g in found])
    y = np.array([g.difference.value for g in found])
    centre = float(x.mean())
    squares = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * y).sum() / squares)
    residuals = y - y.mean() - slope * (x - centre)
    spread = sqrt(float((residuals**2).sum()) / (len(found) - 2))
    return Line(slope, float(y.mean()), spread, centre, squares, len(found))
