"""Straight lines of a cross-entropy's gradient over its probabilities: through one prediction, or many.

Points are ``(n, k)``: k classes of n predictions. A slope is the weight of a prediction. The points of labels
lie elsewhere, and up to two of them are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia.likelihoods.sampling import fine

__all__ = [
    "FEW",
    "TOLERANCE",
    "common_offsets",
    "digits",
    "lines_of_labels",
    "lines_through_zero",
    "own_lines",
    "shared_line",
]

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far a gradient may lie off the line, in units of what the line says."""
SMALLEST = {torch.float16: 2e-6}  # below it a gradient in this dtype has lost its digits
FEW = 4
"""So few classes that a line through one prediction says little."""
_LEAST_SHARE = 0.7  # of the probes, that must lie on the line: a label, or two, do not
_ROWS = 256  # that are solved for together


def digits(gradient: Tensor) -> torch.dtype:
    """The dtype whose digits a gradient has: a wide one may hold what was computed in a narrow one."""
    if gradient.dtype == torch.float32 and bool((gradient == gradient.bfloat16()).all()):
        return torch.bfloat16
    return gradient.dtype


def own_lines(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slope of g over p for each row ``(n, k)``, and whether the points lie on a line, the labels' aside."""
    slope, good = _rising_lines(g, p, dtype)
    falling, fits = _rising_lines(-g, p, dtype)
    fits = fits & ~good & (g.shape[1] > 2)  # of two classes either may be the label
    return torch.where(fits, -falling, slope), good | fits


def lines_through_zero(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for labels without smoothing: all classes but the label's lie on ``g = w p``, and it alone on
    ``g = w (p - 1)``.
    """
    tolerance, smallest = TOLERANCE.get(dtype, 1e-3), SMALLEST.get(dtype, 0.0)
    each = torch.where(g < 0, -g / (1 - p).clamp(min=1e-12), g / p.clamp(min=1e-30))
    slope = each.masked_fill(g.abs() <= smallest, torch.nan).nanmedian(1).values
    off = torch.minimum((g - slope[:, None] * p).abs(), (g - slope[:, None] * (p - 1)).abs())
    slack = tolerance * g.abs() + smallest
    good = _most(off <= slack, g.shape[1]) & slope.isfinite() & ((g < -slack).sum(1) <= 2)
    return slope, good


def _rising_lines(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tolerance, smallest = TOLERANCE.get(dtype, 1e-3), SMALLEST.get(dtype, 0.0)
    slope, good = lines_through_zero(g, p, dtype)
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


def shared_line(g: Tensor, p: Tensor, dtype: torch.dtype) -> float | None:
    """The one slope of all predictions, for so few classes that a row alone cannot tell a weight from a
    smoothed label; None where they do not share one.

    The points of a class lie on two parallel lines, one of them where it is the label. Which are which need
    not be known: the slopes between two points on the same line are the most frequent ones.
    """
    if len(g) < 8:
        return None
    tolerance = TOLERANCE.get(dtype, 1e-3)
    step = max(1, len(g) // 64)
    x, y = p[::step].T.to(fine(p)), g[::step].T.to(fine(g))
    dx, dy = x[:, :, None] - x[:, None], y[:, :, None] - y[:, None]
    apart = dx > 0.05 * (x.amax(1) - x.amin(1))[:, None, None]
    dx, dy = dx[apart], dy[apart]
    rising = dy > 0
    slopes = (dy / dx)[rising].log().sort().values
    if len(slopes) < FEW:
        return None
    within = torch.searchsorted(slopes, slopes + 4 * tolerance) - torch.arange(len(slopes), device=g.device)
    first = int(within.argmax())
    if int(within[first]) < max(FEW, len(dx) // 5):
        return None
    lowest, highest = (float(bound.exp()) for bound in (slopes[first], slopes[first] + 4 * tolerance))
    same = rising & (dy >= lowest * dx) & (dy <= highest * dx)
    if not bool(same.any()):
        return None  # between equal slopes a logarithm's rounding leaves none
    slope = float((dy * dx)[same].sum() / dx[same].square().sum())
    # What is left is a distribution of the label that all share, up to which class it is.
    rest = p - g / slope
    slack = 3 * tolerance * float(g.abs().max()) / slope
    for column, points in zip(rest.T, p.T, strict=True):
        fitted = 1
        for side in (column[column > 0.5], column[column <= 0.5]):
            fitted += bool(len(side))
            if len(side) and float((side - side.median()).abs().max()) > slack:
                return None
        # Two kinds of rows lie on some line, whatever their labels and weights are.
        if _distinct(points) <= fitted:
            return None
    return slope


def _distinct(points: Tensor) -> int:
    return len(torch.unique((points * 1e5).round()))


def _fitted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of least squares for each row, and what is left."""
    dx, dy = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    line = (dx * dy).sum(1) / dx.square().sum(1).clamp(min=1e-30)
    return line, dy - line[:, None] * dx


def _most(on_line: Tensor, points: int) -> Tensor:
    """Whether all points but a label's, of few, or most, of many, lie on the line."""
    least = max(points - 1, 1) if points <= 4 else int(_LEAST_SHARE * points)
    return on_line.sum(1) >= least


def common_offsets(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Slopes of lines ``g = w p - a`` with an own w for each prediction and an a for each class, and which
    fit.

    Label smoothing beside weights of the classes: the smoothed part of a class's own weight stands in every
    prediction. None where there are too few points to tell, or they contradict.
    """
    n, k = g.shape
    if k < FEW or n * (k - 2) < k + FEW:
        return None
    x, y = p.to(fine(p)), g.to(fine(g))
    step = max(1, n // _ROWS)
    some, label, used = (x[::step], y[::step]), g[::step].argmin(1), None
    for _ in range(8):
        offsets = _offsets(*some, label, used)
        if offsets is None:
            return None
        _, rest, found = _without_label(*some, offsets)
        # The label has the lowest gradient, but not where a prediction is surer than its smoothed label.
        done, label = bool((found == label).all()), found
        if done and used is not None:
            break
        used = rest <= 10 * rest.median() + 1e-12 * y.square().amax()
    assert offsets is not None
    slope, rest, _ = _without_label(x, y, offsets)
    bound = 3 * TOLERANCE.get(dtype, 1e-3) * y.abs().amax(1)
    good = (rest <= bound.square()) & (slope > 0)
    # A distribution of the label is not negative.
    if not bool((offsets >= -0.03 * slope.median().abs()).all()):
        return None
    return slope.to(g.dtype), good


def _offsets(x: Tensor, y: Tensor, label: Tensor, used: Tensor | None) -> Tensor | None:
    """The offsets of least squares, the labels and the rows that are not used aside; None if the softmaxes
    are too much alike to tell them from the slopes.
    """
    m = torch.ones_like(x).scatter_(1, label[:, None], 0.0)
    if used is not None:
        m = m * used[:, None]
    # With w_b at its best for a given a, what is left of row b is its part across p_b: linear in a.
    xm = x * m
    share = xm.square().sum(1, keepdim=True).clamp(min=1e-300)
    normal = (torch.diag(m.sum(0)) - xm.T @ (xm / share)).cpu()
    right = ((y * m).sum(0) - ((xm * y).sum(1, keepdim=True) / share * xm).sum(0)).cpu()
    spectrum = torch.linalg.eigvalsh(normal)
    if not float(spectrum[0]) > 1e-6 * float(spectrum[-1]):
        return None
    solved: Tensor = torch.linalg.solve(normal, right)
    return -solved.to(x.device)


def _without_label(x: Tensor, y: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes through zero of ``y + offsets`` over x without one point, the squares that are left, and which
    point is left out: that without which the others fit best.
    """
    s = y + offsets
    xx, xs, ss = ((a * b).sum(1, keepdim=True) - a * b for a, b in ((x, x), (x, s), (s, s)))
    slopes = xs / xx.clamp(min=1e-300)
    rest, label = (ss - slopes * xs).clamp(min=0).min(1)
    return slopes.gather(1, label[:, None])[:, 0], rest, label


def lines_of_labels(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The same for two to four classes: ``g = w (p - q)`` with one w and one q for each label.

    Where a prediction is surer than its smoothed label, the label's gradient is not the lowest: so the labels
    are found in turn with the lines. None where there are too few predictions of a label, or they contradict.
    """
    label, classes = g.argmin(1), g.shape[1]
    size = 3 * TOLERANCE.get(dtype, 1e-3) * g.abs().max()
    for _ in range(12):
        slopes, rests = [], []
        for each in range(classes):
            rows = label == each
            if int(rows.sum()) < FEW or _distinct(p[rows, 0]) < 3:
                return None
            dx, dy = p[rows] - p[rows].mean(0), g[rows] - g[rows].mean(0)
            slope = (dx * dy).sum() / dx.square().sum().clamp(min=1e-30)
            # Medians: until the labels are found some points are not of this line.
            offset = (g[rows] - slope * p[rows]).median(0).values
            slopes.append(slope)
            rests.append((g - slope * p - offset).abs().amax(1))
        rest, found = torch.stack(rests, 1).min(1)
        if bool((found == label).all()):
            break
        label = found
    slope = torch.stack(slopes)
    if not bool((rest <= size).all() & (slope > 0).all()):
        return None
    return slope[label], torch.ones_like(label, dtype=torch.bool)
