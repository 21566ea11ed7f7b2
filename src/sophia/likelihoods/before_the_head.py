"""The weight of each prediction, read from the loss's gradient in the hidden state before the output layer.

A fused linear cross-entropy never has logits. Its gradient in the hidden state of a prediction with label y
is

    w (sum_k p_k s_k W_k - s_y W_y),

with W_k the rows of the output layer, p the softmax, and s_k the slope of logit k in W_k x: 1, but for a
scale or a cap. So w and y are those with which this comes nearest to the gradient that arrived, and how near
it comes shows whether the layer is the one that the loss used. With label smoothing a part of the mean of the
s_k W_k is in it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia.likelihoods.sampling import rows_per_chunk

__all__ = ["Fit", "fit_before_the_head"]

CLOSE = {torch.float64: 1e-3, torch.float32: 2e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Distance from the gradient that arrived, over its length, by the dtype of that. A fused loss may multiply
in bfloat16 whatever it is given, which leaves 3e-3; another layer than the right one leaves 0.5 to 0.9.
"""


_ROUNDING = 1e-6


@dataclass(frozen=True)
class Fit:
    """What a gradient in hidden states says, if the output layer is the right one."""

    weights: Tensor
    """One a prediction, ``(n,)``."""
    labels: Tensor
    """Classes, ``(n,)``."""
    rest: Tensor
    """What is left unexplained, over the length of the gradient, ``(n,)``."""
    sizes: Tensor
    """Length of the gradient, ``(n,)``."""

    def good(self, dtype: torch.dtype) -> Tensor:
        """Which predictions are explained, bool."""
        return self.rest <= CLOSE.get(dtype, 2e-2)  # not NaN

    def share(self, dtype: torch.dtype) -> float:
        """What is explained of the gradient's square. Of a label of which the model is sure nothing but
        rounding arrives, which goes with no label.
        """
        squares = (self.sizes / self.sizes.max().clamp(min=1e-38)).square()
        return float((squares * self.good(dtype)).sum() / squares.sum().clamp(min=1e-38))

    def noise(self, dtype: torch.dtype) -> float:
        """What is left of those that are explained, in the root mean square; infinite if none is."""
        good = self.good(dtype)
        if not bool(good.any()):
            return float("inf")
        squares = (self.sizes[good] / self.sizes.max().clamp(min=1e-38)).square()
        return float(((squares * self.rest[good].square()).sum() / squares.sum().clamp(min=1e-38)).sqrt())


def fit_before_the_head(
    gradient: Tensor,
    hidden: Tensor,
    logits_and_slopes: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    weight: Tensor,
) -> Fit:
    """Fit every prediction, with a hard label or with a smoothed one, whichever comes nearer.

    Args:
        gradient: of the loss in the hidden states, ``(n, d)``.
        hidden: these, ``(n, d)``.
        logits_and_slopes: from some of these to their logits ``(m, V)`` and the slopes of these in the
            products ``W_k x``; None for slopes of 1. In parts, as all logits at once may not fit.
        weight: of the layer, ``(V, d)``.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
        weight = weight.detach().to(wide)
        step = rows_per_chunk(weight.new_empty((1, weight.shape[0])))
        parts = []
        for g, x in zip(torch.split(gradient.to(wide), step), torch.split(hidden, step), strict=True):
            logits, slopes = logits_and_slopes(x)
            s = torch.ones_like(logits) if slopes is None else slopes
            parts.append(_fit(g, logits.to(wide), s.to(wide), weight))
    weights, labels, rest = (torch.cat(each) for each in zip(*parts, strict=True))
    return Fit(weights, labels, rest, gradient.to(wide).norm(dim=1))


def _fit(g: Tensor, z: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = (z.softmax(-1) * s) @ weight
    lengths = (weight.square().sum(1) * s.square()).sub_(2 * s * (mean @ weight.T)).add_(_dot(mean, mean))
    # A label of which the model is sure: what is left of two equal numbers is rounding.
    lengths.clamp_(min=float(_ROUNDING * weight.square().sum(1).max()))
    along = _dot(g, mean) - s * (g @ weight.T)  # of g along mean - s_y W_y, for every y
    hard, label, rest = _nearest(g, mean, s, weight, along, lengths, None)
    # Smoothed: the same after what lies along mean - (mean of all s_k W_k) is taken away.
    even = mean - (s @ weight) / weight.shape[0]
    size = _dot(even, even)
    across = _dot(even, mean) - s * (even @ weight.T)
    share = across / size.clamp(min=1e-30)
    smooth, label_of_smooth, rest_of_smooth = _nearest(
        g, mean, s, weight, along - share * _dot(g, even), lengths - share * across, even
    )
    better = rest_of_smooth < 0.1 * rest
    return (
        torch.where(better, smooth, hard),
        torch.where(better, label_of_smooth, label),
        torch.where(better, rest_of_smooth, rest),
    )


def _nearest(
    g: Tensor, mean: Tensor, s: Tensor, weight: Tensor, along: Tensor, lengths: Tensor, even: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, label and rest for the label that comes nearest; with ``even``, for one that is smoothed."""
    label = (along.square() / lengths.clamp(min=1e-30)).nan_to_num(0.0).argmax(1, keepdim=True)
    direction = mean - s.gather(1, label) * weight[label.squeeze(1)]
    basis = direction[..., None] if even is None else torch.stack([direction, even], -1)
    square = basis.mT @ basis
    ridge = 1e-12 * square.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)
    square = square + ridge[:, None, None] * torch.eye(square.shape[-1], dtype=g.dtype, device=g.device)
    factors = torch.linalg.solve(square, basis.mT @ g[..., None])
    rest = (g[..., None] - basis @ factors).squeeze(-1).norm(dim=1)
    return factors.sum((1, 2)), label.squeeze(1), rest / g.norm(dim=1).clamp(min=1e-30)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)
