"""Ratio of the costs of a step, and a speed-up in steps turned into a speed-up in any cost.

    speed-up in a cost = speed-up in steps * (baseline's cost of a step) / (contender's cost of a step)

The ratio of costs is taken between runs of equal seed and budget, in logarithms, over all such pairs: a
machine that is slow for an hour slows both members of a pair. Steps, tokens, gradient evaluations and FLOPs
are counted and the same in every pair; seconds are measured, so their ratio has an interval of its own
(Student's t over the pairs) which is joined to that of the speed-up by squares of the distances in
logarithms (MOVER; Zou and Donner 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log, sqrt

import numpy as np
from scipy import stats

from sophia.lab.analysis.seed_noise import LEVEL
from sophia.lab.analysis.speedup import Ratio
from sophia.lab.config.record_format import EndNumber

COSTS: tuple[tuple[EndNumber, str], ...] = (
    ("steps", "steps"),
    ("tokens", "tokens"),
    ("gradient_evaluations", "gradient evaluations"),
    ("flops", "FLOPs"),
    ("seconds", "seconds"),
)
"""Costs in which a speed-up is given: the field of a run's result, and its name in words."""


@dataclass(frozen=True)
class CostRatio:
    """The baseline's cost of a step over the contender's; low and high are None if a measured cost has one
    pair only.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int


def cost_ratio(pairs: Sequence[tuple[float, float]]) -> CostRatio | None:
    """From (baseline, contender) costs of a step in runs of equal seed and budget; None without a pair.

    >>> cost_ratio([(1.0, 1.05), (1.0, 1.05)])
    CostRatio(value=0.952..., low=0.952..., high=0.952..., pairs=2)
    """
    logs = np.array([log(b) - log(c) for b, c in pairs if b > 0 and c > 0])
    if len(logs) == 0:
        return None
    centre = float(np.mean(logs))
    if len(logs) == 1:
        return CostRatio(exp(centre), None, None, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1) * np.std(logs, ddof=1) / sqrt(len(logs)))
    return CostRatio(exp(centre), exp(centre - half), exp(centre + half), len(logs))


def in_cost(ratio: Ratio, cost: CostRatio) -> Ratio:
    """The speed-up in steps as a speed-up in this cost; bounds that were open stay open."""
    moved = replace(
        ratio,
        value=ratio.value * cost.value,
        floor=ratio.floor * cost.value,
        ceiling=ratio.ceiling * cost.value,
    )
    if ratio.low is None or ratio.high is None or cost.low is None or cost.high is None:
        return replace(moved, low=None, high=None)
    return replace(
        moved,
        low=_joined(ratio.value, ratio.low, cost.value, cost.low),
        high=_joined(ratio.value, ratio.high, cost.value, cost.high),
    )


def _joined(ratio: float, ratio_bound: float, cost: float, cost_bound: float) -> float:
    """One bound of a product of two independent estimates."""
    if ratio_bound in (0.0, inf):
        return ratio_bound
    if not isfinite(ratio) or ratio == 0:  # the value is open on this side while its bound is not
        return ratio_bound * cost_bound
    side = 1.0 if ratio_bound >= ratio else -1.0
    distance = sqrt(log(ratio_bound / ratio) ** 2 + log(cost_bound / cost) ** 2)
    if ratio_bound == ratio:
        side = 1.0 if cost_bound > cost else -1.0
    return ratio * cost * exp(side * distance)
