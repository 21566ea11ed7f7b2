"""The weight of each prediction in the user's loss, read from the loss's gradient in the outputs.

The gradient of ``sum_b w_b CE(z_b, y_b)`` in the logits of prediction b is ``w_b (p_b - q_b)``, with p the
softmax and q the label's distribution. Over the classes in which q is zero, or one number (label smoothing),
it is a straight line in p with slope w_b. So a few classes of each prediction tell its weight, whatever the
reduction of the loss: mean, sum, a mean of means, weights of classes or rows, a factor of accumulation or of
a scaler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia.likelihoods.sampling import rows_per_chunk

__all__ = ["Probes", "Reading", "probes_of", "read_weights", "read_yes_or_no"]

PROBES = 32
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far a gradient may lie off the line, in units of what the line says."""
_SMALLEST = {torch.float16: 2e-6}  # below it a gradient in this dtype has lost its digits
_LEAST_SHARE = 0.7  # of the probes, that must lie on the line: a label, or two, do not


@dataclass(frozen=True)
class Probes:
    """What is kept of logits ``(N, V)`` until their gradient arrives."""

    classes: Tensor
    """Some of the classes of each prediction, ``(N, k)``; the most probable one among them."""
    probabilities: Tensor
    """Theirs, float32."""
    total: Tensor
    """Logarithm of the sum of exponentials, ``(N,)``: zero if the outputs are log-probabilities already."""


@dataclass(frozen=True)
class Reading:
    """What a gradient in the outputs says of the loss."""

    weights: Tensor | None
    """One a prediction, float32, of the shape of the mask; None where the gradient is no line in p."""
    problem: str | None = None
    """What the loss seems to be if it is no weighted cross-entropy, and what to do then."""


def probes_of(outputs: Tensor) -> Probes:
    """Take the probes of logits ``(..., V)``."""
    logits = outputs.detach().reshape(-1, outputs.shape[-1])
    classes = logits.shape[-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    if classes <= PROBES:
        fixed = torch.arange(classes, device=logits.device)
    else:
        fixed = torch.arange(PROBES - 1, device=logits.device) * (classes // (PROBES - 1))
    picked, values, totals = [], [], []
    for part in torch.split(logits, rows_per_chunk(logits)):
        z = part.to(wide)
        top, best = z.max(-1, keepdim=True)
        total = (z - top).exp_().sum(-1, keepdim=True).log_().add_(top)
        chosen = fixed.expand(len(z), -1)
        if classes > PROBES:
            chosen = torch.cat([chosen, best], 1)
        picked.append(chosen)
        values.append((z.gather(1, chosen) - total).exp_())
        totals.append(total.squeeze(1))
    if not picked:
        empty = logits.new_zeros((0, 1), dtype=wide)
        return Probes(empty.long(), empty, empty.squeeze(1))
    return Probes(torch.cat(picked), torch.cat(values), torch.cat(totals))


def read_weights(gradient: Tensor, probes: Probes, counted: Tensor) -> Reading:
    """The weights of the predictions that count.

    Args:
        gradient: of the loss in the logits, ``(..., V)``.
        probes: of these logits.
        counted: which predictions count, bool.
    """
    flat, mask = gradient.detach().reshape(-1, gradient.shape[-1]), counted.reshape(-1)
    weights = torch.zeros(mask.shape, dtype=probes.probabilities.dtype, device=gradient.device)
    rows = mask.nonzero().squeeze(1)
    if not len(rows):
        return Reading(weights.view(counted.shape))
    if bool((probes.total[rows].abs() < 1e-3).all()):
        # Log-probabilities, and a loss that takes some of them: its gradient says the weight itself.
        sums = flat[rows].sum(-1, dtype=weights.dtype)
        if bool((sums < 0).all()):
            weights[rows] = -sums
            return Reading(weights.view(counted.shape))
    g = flat.gather(1, probes.classes)[rows].to(weights.dtype)
    p = probes.probabilities[rows]
    found, good = _lines(g, p, gradient.dtype)
    one = _shared_line(g, p, gradient.dtype) if g.shape[1] <= 3 else None
    if one is not None:
        found, good = torch.full_like(found, one), torch.ones_like(good)
    if float(good.float().mean()) < 0.9:
        return Reading(None, _temperature(g, p, gradient.dtype))
    if bool((found[good] < 0).any()):
        share = float((found[good] < 0).float().mean())
        return Reading(
            None,
            f"{share:.0%} of its predictions have a negative weight (advantages of both signs, a pair of "
            "losses with a minus between them, unlikelihood): such a loss is no likelihood and has no "
            "Gauss-Newton curvature. Use mode='manual' with opt.hessian_pass(), or estimator='hutchinson'",
        )
    # A prediction whose gradient has underflowed says nothing of itself.
    middle = found[good].median()
    found = torch.where(good, found, middle)
    # Weights that differ by no more than they are known by are one.
    if bool(((found - middle).abs() <= 2 * _TOLERANCE.get(gradient.dtype, 1e-3) * middle.abs()).all()):
        found = middle
    weights[rows] = found
    return Reading(weights.view(counted.shape))


def read_yes_or_no(gradient: Tensor, probabilities: Tensor, counted: Tensor) -> Reading:
    """The weights of the elements of a binary cross-entropy: the gradient is ``w (p - y)``, y 0 or 1.

    Smoothed labels lie on two lines of one slope; then that is the weight of all.
    """
    g, p = gradient.detach().to(probabilities.dtype)[counted], probabilities[counted]
    weights = torch.zeros_like(probabilities)
    each = torch.where(g > 0, g / p.clamp(min=1e-30), -g / (1 - p).clamp(min=1e-12))
    slopes = []
    for part in (g > 0, g < 0):
        if int(part.sum()) >= 4:
            line, rest = _fitted(p[part][None], g[part][None])
            bound = 3 * _TOLERANCE.get(gradient.dtype, 1e-3) * float(g[part].abs().max())
            slopes.append(float(line) if float(rest.abs().max()) <= bound else torch.nan)
    if slopes and min(slopes) > 0 and max(slopes) < 1.01 * min(slopes):
        each = torch.full_like(each, sum(slopes) / len(slopes))
    weights[counted] = each
    return Reading(weights)


def _lines(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slope of g over p for each row ``(n, k)``, and whether the points lie on a line, the labels' aside."""
    slope, good = _rising_lines(g, p, dtype)
    falling, fits = _rising_lines(-g, p, dtype)
    fits = fits & ~good & (g.shape[1] > 2)  # of two classes either may be the label
    return torch.where(fits, -falling, slope), good | fits


def _rising_lines(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tolerance, smallest = _TOLERANCE.get(dtype, 1e-3), _SMALLEST.get(dtype, 0.0)
    # Without smoothing all classes but the label's lie on g = w p, and it alone on g = w (p - 1).
    each = torch.where(g < 0, -g / (1 - p).clamp(min=1e-12), g / p.clamp(min=1e-30))
    slope = each.masked_fill(g.abs() <= smallest, torch.nan).nanmedian(1).values
    off = torch.minimum((g - slope[:, None] * p).abs(), (g - slope[:, None] * (p - 1)).abs())
    slack = tolerance * g.abs() + smallest
    good = _most(off <= slack, g.shape[1]) & slope.isfinite() & ((g < -slack).sum(1) <= 2)
    if g.shape[1] <= 3:
        return slope, good
    order = g.argsort(1)
    for labels in (1, 2):  # the lowest are the labels'
        kept = order[:, labels:]
        x, y = p.gather(1, kept), g.gather(1, kept)
        line, rest = _fitted(x, y)
        # Beside a class of large probability the others are known to the digits of that one.
        rounding = 1e-6 * y.abs().amax(1, keepdim=True)
        bound = tolerance * torch.maximum(y.abs(), (line[:, None] * x).abs()) + smallest + rounding
        fits = _most(rest.abs() <= bound, x.shape[1]) & ~good & (line > 0)
        slope, good = torch.where(fits, line, slope), good | fits
    return slope, good


def _shared_line(g: Tensor, p: Tensor, dtype: torch.dtype) -> float | None:
    """The one slope of all predictions, for so few classes that a row alone cannot tell a weight from a
    smoothed label; None where they do not share one.
    """
    if len(g) < 8:
        return None
    order = g.argsort(1)[:, 1:]
    x, y = p.gather(1, order).reshape(1, -1), g.gather(1, order).reshape(1, -1)
    line, rest = _fitted(x, y)
    slope, bound = float(line), 3 * _TOLERANCE.get(dtype, 1e-3) * float(y.abs().max())
    return slope if slope > 0 and float(rest.abs().max()) <= bound else None


def _fitted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of least squares for each row, and what is left."""
    dx, dy = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    line = (dx * dy).sum(1) / dx.square().sum(1).clamp(min=1e-30)
    return line, dy - line[:, None] * dx


def _most(on_line: Tensor, points: int) -> Tensor:
    """Whether all points but a label's, of few, or most, of many, lie on the line."""
    least = max(points - 1, 1) if points <= 4 else int(_LEAST_SHARE * points)
    return on_line.sum(1) >= least


def _temperature(g: Tensor, p: Tensor, dtype: torch.dtype) -> str | None:
    """Whether the gradient is that of a cross-entropy of ``logits / T``: its logarithm is a line in log p."""
    positive = (g > 4 * _SMALLEST.get(dtype, 0.0)) & (p > 0)
    if int(positive.sum(1).median()) < 3:
        return None
    nan = torch.nan
    x, y = (
        p.clamp(min=1e-30).log().masked_fill(~positive, nan),
        g.clamp(min=1e-30).log().masked_fill(~positive, nan),
    )
    dx, dy = x - x.nanmean(1, keepdim=True), y - y.nanmean(1, keepdim=True)
    slopes = (dx * dy).nansum(1) / dx.square().nansum(1).clamp(min=1e-30)
    slope = float(slopes.median())
    rest = (dy - slopes[:, None] * dx).abs().nan_to_num(0.0).amax(1)
    if not (float(rest.median()) < 10 * _TOLERANCE.get(dtype, 1e-3) and abs(slope - 1) > 0.02 and slope > 0):
        return None
    return (
        f"it is a cross-entropy of the outputs divided by {1 / slope:.3g}, a temperature outside the model. "
        f"Pass logits_fn=, a function from the output to the logits / {1 / slope:.3g}"
    )
