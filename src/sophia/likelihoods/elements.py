"""Weights of predictions of one number each, read from the gradient of the loss, and losses told from theirs.

A binary cross-entropy has ``w (p - y)``, y 0 or 1 (or soft); counts have ``w (rate - y)``, y a whole number,
which gives w away. A squared error has ``2 w (z - y)``, and any y will do: its weight cannot be read from the
gradient, and what stands here tells absolute errors from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia.likelihoods.comparisons import in_pairs, in_pieces, of_pairs, of_pieces
from sophia.likelihoods.lines import TOLERANCE, digits
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.sampling import fine
from sophia.likelihoods.soft_targets import bound_is
from sophia.likelihoods.weights import Reading

__all__ = ["Kept", "kept_of", "read_counts", "read_squares", "read_yes_or_no"]

_ENTRIES, _SIDE = 4096, 64
_ANSWERS, _COUNTS, _SQUARES = "binary cross-entropy of yes-or-no answers", "Poisson loss", "squared error"
_ENOUGH = 8  # elements, below which nothing is concluded


@dataclass(frozen=True)
class Kept:
    """Some elements of an output."""

    step: int
    outputs: Tensor


def kept_of(outputs: Tensor) -> Kept:
    """Elements at equal distances."""
    flat = outputs.detach().reshape(-1)
    step = max(1, flat.numel() // _ENTRIES)
    return Kept(step, flat[::step].clone())


def read_yes_or_no(gradient: Tensor, probabilities: Tensor, counted: Tensor) -> Reading:
    """The weights of the elements of a binary cross-entropy: the gradient is ``w (p - y)``, y 0 or 1.

    Smoothed labels lie on two lines of one slope; then that is the weight of all. Soft ones leave a lower
    bound of it, which is close over many elements.
    """
    g, p = gradient.detach().to(probabilities.dtype)[counted], probabilities[counted]
    weights = torch.zeros_like(probabilities)
    dtype = digits(gradient)
    if not bool(g.isfinite().all()):
        return Reading(None)
    if _is_one_a_row(counted) and in_pairs(g, dtype):
        return Reading(None, of_pairs(_ANSWERS))
    if in_pieces(g, p, dtype):
        return Reading(None, of_pieces(_ANSWERS))
    each = torch.where(g > 0, g / p.clamp(min=1e-30), -g / (1 - p).clamp(min=1e-12))
    slopes = []
    for part in (g > 0, g < 0):
        if int(part.sum()) >= 4:
            slopes.append(_slope(p[part], g[part], dtype))
    # Not by min alone, which passes over a NaN.
    if slopes and all(s > 0 for s in slopes) and max(slopes) < 1.01 * min(slopes):
        each = torch.full_like(each, sum(slopes) / len(slopes))
    elif len(each) >= _ENOUGH and not _few_values(each, dtype):
        weights[counted] = each
        if not _is_product(weights, gradient > 0, counted, dtype):
            sure = (p > 1e-3) & (p < 1 - 1e-3)
            bound = float(each[sure].max()) if bool(sure.any()) else 0.0
            natural = bound_is(bound, len(each))
            if natural is None:
                problem = _soft_or_weighted(float(each.min() / each.max()), bound * len(each))
                # With one answer a row, weights of the rows are as likely as soft answers.
                return Reading(weights if _is_one_a_row(counted) else None, problem)
            each = torch.full_like(each, natural)
    weights[counted] = each
    return Reading(weights)


def read_counts(gradient: Tensor, kept: Kept, counted: Tensor) -> Reading:
    """The weights of counts: with the right one, ``rate - gradient / w`` are whole numbers."""
    every = counted.reshape(-1)[:: kept.step]
    g = gradient.detach().reshape(-1)[:: kept.step][every].to(fine(gradient))
    rate, number = kept.outputs[every].to(g.dtype).exp(), int(counted.sum())
    if len(g) < _ENOUGH or not bool(g.isfinite().all() & rate.isfinite().all()):
        return Reading(None)
    tolerance = 5 * TOLERANCE.get(digits(gradient), 1e-3)
    # Where y is 0 the gradient is w times the rate, and larger nowhere.
    bounds = (g / rate).sort(descending=True).values
    for weight in (1 / number, 1.0, float(bounds[0]), float(bounds[min(len(bounds) - 1, len(bounds) // 50)])):
        if weight > 0:
            y = rate - g / weight
            whole = ((y - y.round()).abs() <= tolerance * (1 + y.abs() + rate)) & (y > -0.5)
            fit = float(whole.float().mean())
            if fit >= 0.95:
                return Reading(torch.where(counted, weight, 0.0).float(), fit=fit)
    return Reading(
        None,
        Problem(
            "counts",
            "with no one weight do its targets come out as whole numbers: rows or elements are weighted, or "
            "the targets are no counts",
            "Until it can be read, each weighs as in a mean: weigh the loss of the whole instead, or write a "
            "likelihood of your own with the weights in it (docs/losses.md)",
            of=_COUNTS,
        ),
    )


def read_squares(gradient: Tensor, kept: Kept, counted: Tensor) -> Reading:
    """No weights: a mean is taken for granted. Absolute errors have gradients of one size, and are told."""
    every = counted.reshape(-1)[:: kept.step]
    signed = gradient.detach().reshape(-1)[:: kept.step][every].to(fine(gradient))
    g, z, dtype = signed.abs(), kept.outputs[every].to(signed.dtype), digits(gradient)
    if _is_one_a_row(counted) and kept.step == 1 and in_pairs(signed, dtype):
        return Reading(None, of_pairs(_SQUARES))
    if len(g) < _ENOUGH or float((z - z.mean()).abs().max()) <= 1e-2 * float(z.abs().max()):
        return Reading(None)
    top = g.max()
    share = float(((g - top).abs() <= 1e-6 * top).float().mean())
    if share >= 0.9:
        return Reading(
            None,
            Problem(
                "absolute error",
                "it has the same size everywhere, whatever the outputs are: it is that of an absolute error "
                "(L1), which has no curvature, and not of a squared one",
                "Use mse_loss or smooth_l1_loss, or an optimizer without curvature",
                nonsense=True,
                of=_SQUARES,
            ),
        )
    if in_pieces(signed, z, dtype):
        return Reading(None, of_pieces(_SQUARES))
    if share >= 0.05 and share * len(g) >= _ENOUGH:
        return Reading(
            None,
            Problem(
                "straight ends",
                f"{share:.0%} of it has one and the same, largest size: a squared error with straight ends "
                "(smooth_l1_loss, huber_loss), which have no curvature, while h counts that of a squared "
                "error for all",
                "Its middle has the scale of Gaussian(sigma=1.0) for beta = 1",
                of=_SQUARES,
            ),
        )
    return Reading(None)


def _slope(p: Tensor, g: Tensor, dtype: torch.dtype) -> float:
    """Of a straight line through these points; NaN if they lie on none."""
    dp, dg = p - p.mean(), g - g.mean()
    line = (dp * dg).sum() / dp.square().sum().clamp(min=1e-30)
    bound = 3 * TOLERANCE.get(dtype, 1e-3) * float(g.abs().max())
    return float(line) if float((dg - line * dp).abs().max()) <= bound else torch.nan


def _few_values(each: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights take few values, as those of classes, of answers, or none at all do."""
    steps = 1 / (4 * TOLERANCE.get(dtype, 1e-3))
    some = each[:: max(1, len(each) // _ENTRIES)]
    return len(torch.unique((some / some.max() * steps).round())) <= max(2, len(some) // 8)


def _is_one_a_row(counted: Tensor) -> bool:
    return counted.ndim < 2 or counted.shape[-1] == 1


def _is_product(weights: Tensor, positive: Tensor, counted: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights are products of one for the row, one for the column, and one for the answer, as weights
    of hard labels are. Asked of a few rows and columns.
    """
    if _is_one_a_row(counted):
        return False
    wide = [each.reshape(-1, counted.shape[-1]) for each in (weights, positive, counted)]
    for axis in (0, 1):
        size = wide[0].shape[axis]
        some = torch.linspace(0, size - 1, min(size, _SIDE), device=weights.device).long()
        wide = [each.index_select(axis, some) for each in wide]
    row, column = wide[2].nonzero(as_tuple=True)
    factors = (row, column, wide[1][row, column].long())
    rest = wide[0][row, column].to(fine(weights))
    if len(rest) < int(row.max()) + int(column.max()) + 4 or not bool((rest > 0).all()):
        return True  # as many factors as elements fit anything
    rest = rest.log()
    for _ in range(60):  # means of rows, columns and answers in turn: least squares
        for of in factors:
            sums = rest.new_zeros(int(of.max()) + 1)
            counts = torch.zeros_like(sums).index_add_(0, of, torch.ones_like(rest)).clamp_(min=1)
            rest = rest - (sums.index_add_(0, of, rest) / counts)[of]
    return float((rest.abs() <= 5 * TOLERANCE.get(dtype, 1e-3)).float().mean()) >= 0.9


def _soft_or_weighted(lowest: float, highest: float) -> Problem:
    return Problem(
        "soft or weighted answers",
        "answers are soft, or every element has a weight of its own (from "
        f"{lowest:.2g} to 1; focal losses of two classes have), and its gradient does not tell which; "
        f"somewhere it is at least {highest:.2g} of a mean's",
        "Until it can be told each weighs as in a mean of all elements; if that is not your loss, write a "
        "likelihood with its curvature (docs/losses.md), or use estimator='hutchinson'; if scores of several "
        "forwards are compared (chosen and rejected), use mode='manual' and hp.sampled_loss(chosen - "
        "rejected)",
        of=_ANSWERS,
    )
