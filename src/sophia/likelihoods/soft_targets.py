"""Weights of predictions whose targets are soft in every class.

The gradient is ``w (p - q)`` with all of q unknown: as q is not negative, ``w >= g / p`` in every class, and
no more is certain. Where several classes come close to one bound, their q are next to nothing and the bound
is the weight: so it is for all but the flattest teachers. A bound close to the weight of a mean, or of a sum,
is taken for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia.likelihoods.lines import TOLERANCE
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.problems import two_classes, unread_soft_targets

__all__ = ["bound_is", "soft_weights", "weight_of_two_classes"]

_LEAST = 1e-4  # probability, under which a ratio has no digits
_NEAR = 0.1  # of few predictions of few classes the bound is not closer
_ENOUGH = 8  # predictions, below which nothing is concluded
_FEW_TARGETS = 4  # of pairs of two labels: 0, 1, the share, and what is left of it


def soft_weights(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Problem | None]:
    """The weights ``(n,)``; None for those of a mean; or the problem, where they cannot be told.

    Args:
        g: the gradient in a few classes of each prediction, ``(n, k)``.
        p: their probabilities.
        dtype: of which g has the digits.
    """
    n = len(g)
    ratios = (g / p.clamp(min=_LEAST)).masked_fill(p < _LEAST, 0.0)
    top = ratios.topk(min(3, g.shape[1]), 1).values
    bounds = top[:, 0]
    near = 2 * max(TOLERANCE.get(dtype, 1e-3), 5e-3)
    if g.shape[1] > 3:
        tight = (top[:, -1] >= (1 - near) * bounds) & (bounds > 0)
        if float(tight.float().mean()) >= 0.9:
            return torch.where(tight, bounds, bounds[tight].median()), None
    bound = float(bounds.max())
    natural = bound_is(bound, n)
    if natural is not None:
        return (None if natural == 1 / n else torch.full_like(bounds, natural)), None
    # Three predictions, of three teachers, that agree on the bound to their last digits.
    best = bounds.sort(descending=True).values
    if n > 3 and float(best[3]) >= (1 - 2 * TOLERANCE.get(dtype, 1e-3)) * bound:
        return torch.full_like(bounds, bound), None
    return None, unread_soft_targets(bound * n)


def bound_is(bound: float, count: int) -> float | None:
    """The weight of a mean or of a sum, if a lower bound comes close to it."""
    return next((w for w in (1 / count, 1.0) if (1 - _NEAR) * w <= bound <= (1 + 1e-3) * w), None)


def weight_of_two_classes(
    weights: Tensor, g: Tensor, p: Tensor, dtype: torch.dtype
) -> tuple[float | None, Problem | None]:
    """The one weight of soft targets that take few values, as a mixture of pairs makes of them (mixup), or
    what to say where targets may be soft; neither where labels are hard.

    Args:
        weights: of the predictions if their labels are hard, which of two classes any gradient allows.
        g: the gradient, ``(n, 2)``.
        p: the probabilities.
        dtype: of which g has the digits.
    """
    n, tolerance = len(g), TOLERANCE.get(dtype, 1e-3)
    top = float(weights.max())
    if n < _ENOUGH or not top > 0 or _values(weights / top, tolerance) <= max(2, n // 4):
        return None, None  # weights of classes, or of a few kinds of rows
    # Where both of a pair have one label, the target is hard and its weight that of all.
    targets = p[:, 1] - g[:, 1] / top
    if _values(targets, tolerance) <= _FEW_TARGETS:
        return top, None
    # No target is below zero: so no weight of a mean, read as if of hard labels, is above 1 / n.
    if 0.5 < top * n < 1.001:
        return None, two_classes(float(weights.min()) * n, top * n)
    return None, None


def _values(numbers: Tensor, tolerance: float) -> int:
    """How many numbers there are that differ by more than a tolerance."""
    return 1 + int((numbers.sort().values.diff() > 2 * tolerance).sum())
