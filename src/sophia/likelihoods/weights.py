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

from sophia.likelihoods.evidence import BALANCE, Evidence
from sophia.likelihoods.lines import (
    FEW,
    TOLERANCE,
    common_offsets,
    digits,
    lines_of_labels,
    lines_through_zero,
    own_lines,
    shared_line,
)
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.problems import find_problem, of_own_probability, one_column, signs
from sophia.likelihoods.sampling import fine, rows_per_chunk
from sophia.likelihoods.soft_targets import soft_weights, weight_of_two_classes

__all__ = ["Probes", "Reading", "dimension_of_classes", "probes_of", "read_weights"]

PROBES = 32
_WHOLE = 2**16  # entries that are kept of whole outputs


@dataclass(frozen=True)
class Probes:
    """What is kept of logits ``(N, V)`` until their gradient arrives."""

    classes: Tensor
    """Some of the classes of each prediction, ``(N, k)``; the most probable one among them."""
    probabilities: Tensor
    """Theirs, float32."""
    total: Tensor
    """Logarithm of the sum of exponentials, ``(N,)``: zero if the outputs are log-probabilities already."""
    some: Tensor
    """Numbers of a few predictions, ``(s,)``."""
    outputs: Tensor
    """Their whole outputs, ``(s, V)``, float32: of these it is asked what the loss is if no cross-entropy."""


@dataclass(frozen=True)
class Reading:
    """What a gradient in the outputs says of the loss."""

    weights: Tensor | None
    """One a prediction, float32, of the shape of the mask; None where the gradient is no line in p."""
    problem: Problem | None = None
    """What the loss seems to be if it is not the likelihood's, and what to do then."""
    fit: float | None = None
    """Share of the predictions that count whose gradient is that of the likelihood's loss, to the digits of
    its dtype; None where that cannot be asked, as any gradient fits some weight or target.
    """


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
    number = min(len(logits), max(1, min(64, _WHOLE // max(1, classes))))
    some = torch.linspace(0, max(0, len(logits) - 1), number, device=logits.device).long()
    whole = logits[some].to(wide)
    if not picked:
        empty = logits.new_zeros((0, 1), dtype=wide)
        return Probes(empty.long(), empty, empty.squeeze(1), some, whole)
    return Probes(torch.cat(picked), torch.cat(values), torch.cat(totals), some, whole)


def read_weights(gradient: Tensor, probes: Probes, counted: Tensor) -> Reading:
    """The weights of the predictions that count.

    Args:
        gradient: of the loss in the logits, ``(..., V)``.
        probes: of these logits.
        counted: which predictions count, bool.
    """
    flat, mask = gradient.detach().reshape(-1, gradient.shape[-1]), counted.reshape(-1)
    if flat.shape[-1] == 1:
        return Reading(None, one_column())
    weights = torch.zeros(mask.shape, dtype=probes.probabilities.dtype, device=gradient.device)
    rows = mask.nonzero().squeeze(1)
    if not len(rows):
        return Reading(weights.view(counted.shape))
    g, p = flat.gather(1, probes.classes)[rows], probes.probabilities[rows]
    dtype, g = digits(g), g.to(weights.dtype)
    if not bool(g.isfinite().all() & p.isfinite().all()):
        return Reading(None)  # of that the refresh speaks
    taken = _of_log_probabilities(flat[rows], probes.total[rows])
    of_two = taken is None and flat.shape[-1] == 2
    found, good = taken or _on_lines(g, p, dtype)
    if taken is None and flat.shape[-1] <= FEW:  # through few points, a label's aside, there is always a line
        slack = BALANCE.get(dtype, 1e-4) * (g.norm(dim=1) + found.abs())  # the label's 1 - p is rounded
        good = good & (g.sum(1).abs() <= slack)
    fit: float | None = float(good.float().mean())
    if fit is not None and fit < 0.9:
        off = rows[~good]
        evidence = Evidence.of(flat, g[~good], p[~good], probes, mask, off, dtype)
        if evidence.is_noise(len(rows)):
            return Reading(None)
        problem = find_problem(evidence)
        if problem is not None:
            return Reading(None, problem, fit)
        soft, problem = soft_weights(g, p, dtype)
        if soft is None:  # those of a mean, which is what is taken for unread ones, or a problem
            return Reading(None, problem, None if problem is None else fit)
        found, good, fit = soft, torch.ones_like(good), None
    negative = float((found[good] < 0).float().mean())
    if negative:
        return Reading(None, signs(negative), fit)
    # A prediction whose gradient has underflowed says nothing of itself.
    middle = found[good].median()
    found = torch.where(good, found, middle)
    # Weights that differ by no more than they are known by are one.
    if bool(((found - middle).abs() <= 2 * TOLERANCE.get(dtype, 1e-3) * middle.abs()).all()):
        found = middle
    weights[rows] = found
    problem = of_own_probability(flat, p, weights, rows) if found.ndim else None
    if found.ndim and problem is None and of_two:
        one, problem = weight_of_two_classes(found, g, p, dtype)
        if one is not None:
            weights[rows] = one
    return Reading(weights.view(counted.shape), problem, fit)


def dimension_of_classes(gradient: Tensor) -> int | None:
    """The dimension over which a gradient sums to zero if it is not the last one; None if there is none."""
    last = gradient.ndim - 1
    size = float(gradient.norm())
    if last < 2 or not size > 0:
        return None
    near = 10 * BALANCE.get(digits(gradient), 1e-4) * size
    sums = {dim: float(gradient.sum(dim, dtype=fine(gradient)).norm()) for dim in range(1, last + 1)}
    if sums.pop(last) <= near:
        return None
    return next((dim for dim, total in sums.items() if total <= near), None)


def _of_log_probabilities(g: Tensor, total: Tensor) -> tuple[Tensor, Tensor] | None:
    """Outputs that are log-probabilities, and a loss that takes some of them: its gradient says the weight
    itself, of either sign. None for other outputs and losses.
    """
    if not bool((total.abs() < 1e-3).all()):
        return None
    sums = g.sum(-1, dtype=total.dtype)
    if not bool((sums.abs() > 0.5 * g.abs().sum(-1, dtype=total.dtype)).all()):
        return None
    return -sums, torch.ones_like(sums, dtype=torch.bool)


def _on_lines(g: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slopes, and which predictions fit."""
    if g.shape[1] <= FEW:
        one = shared_line(g, p, dtype)
        if one is not None:
            return torch.full_like(g[:, 0], one), torch.ones_like(g[:, 0], dtype=torch.bool)
        of_labels = lines_of_labels(g, p, dtype)
        if of_labels is not None:
            return of_labels
    hard = lines_through_zero(g, p, dtype)
    if float(hard[1].float().mean()) >= 0.9:
        return hard
    # Smoothed: together the predictions tell more than each alone.
    fixed = slice(None) if g.shape[1] < PROBES else slice(0, PROBES - 1)  # the last is each one's best
    common = common_offsets(g[:, fixed], p[:, fixed], dtype)
    if common is not None and float(common[1].float().mean()) >= 0.9:
        return common
    return own_lines(g, p, dtype)
