"""Learning-rate factors as pure functions of the step: nothing to save, exact on resume."""

from __future__ import annotations

import math

from sophia.lab.config.run import Schedule

__all__ = ["cosine", "factor", "warmup_stable_decay"]


def cosine(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """Linear warm-up, then half a cosine from 1 down to ``floor`` at the last step.

    ``step`` counts from 0, and is the step about to be taken. Warm-up ends at 1 and never takes a step of
    size 0.

    >>> [round(cosine(s, steps=6, warmup=2, floor=0.1), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_stable_decay(step: int, *, steps: int, warmup: int, floor: float, decay: float) -> float:
    """Linear warm-up, 1 for most of the run, and a straight line down to ``floor`` over the last share
    ``decay``.

    Runs that differ in ``steps`` alone are equal up to where the shorter begins to decay.

    >>> [round(warmup_stable_decay(s, steps=6, warmup=2, floor=0.0, decay=0.5), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.667, 0.333, 0.0]
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    length = max(1, round(steps * decay))
    left = max(0, steps - 1 - step)
    return floor + (1 - floor) * min(1.0, left / length)


def factor(schedule: Schedule, step: int, *, steps: int) -> float:
    """The factor of a configured schedule at a step counted from 0."""
    if schedule.kind == "wsd":
        return warmup_stable_decay(
            step, steps=steps, warmup=schedule.warmup, floor=schedule.floor, decay=schedule.decay
        )
    return cosine(step, steps=steps, warmup=schedule.warmup, floor=schedule.floor)
