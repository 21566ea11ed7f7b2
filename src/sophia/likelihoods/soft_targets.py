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
from sophia.likelihoods.problems import Problem, unread_soft_targets

__all__ = ["bound_is", "soft_weights"]

_LEAST = 1e-4  # probability, under which a ratio has no digits
_NEAR = 0.03


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
