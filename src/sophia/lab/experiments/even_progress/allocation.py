"""Which coordinates of a model the loss went down through, grouped by their curvature.

Along a step from theta to theta + delta the loss changes by the line integral of the gradient, which is a sum
over coordinates:

    L(theta + delta) - L(theta) = sum_i delta_i integral_0^1 g_i(theta + s delta) ds

Simpson's rule with the gradients at both ends and in the middle gives each coordinate its part; where the
parts of a step do not add up to its change, the step is halved. The loss is that of a fixed set of held-out
sequences, not of the batch. How well all parts add up is recorded. (Lan et al., "LCA: Loss Change Allocation
for Neural Network Training", arXiv 1909.01440, do the same with Runge-Kutta.)

The curvature is a mean of Gauss-Newton-Bartlett estimates on the same sequences, renewed every ``window``
steps; its tenths hold equally many coordinates, flattest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sophia.curvature import GaussNewtonBartlett
from sophia.lab.config.run import Setting
from sophia.lab.experiments.framework import small_language_model
from sophia.lab.experiments.framework.probing import mean_estimate
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.models import build
from sophia.likelihoods import Categorical

__all__ = ["BUCKETS", "allocate", "simpson", "tenths"]

BUCKETS = 10


def allocate(
    contender: str,
    settings: Mapping[str, Setting],
    *,
    steps: int,
    window: int,
    draws: int,
    seed: int,
    quick: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Train the small model and allocate the change of its held-out loss to tenths of the coordinates."""
    shape, source = small_language_model.shape(quick), small_language_model.text(quick)
    ids, _ = source.held_out(sequences=4 if quick else 8, context=shape.context)
    model, probe = (build.gpt2(shape, seed=seed) for _ in range(2))
    change, moved = torch.zeros(2, BUCKETS, dtype=torch.float64)
    curvature = torch.zeros(BUCKETS, dtype=torch.float64)
    first, before = math.nan, None  # the loss at the start; weights, loss and gradient before the step
    loss, bucket, windows = 0.0, torch.empty(0), 0
    for step in small_language_model.training(
        model,
        contender,
        settings,
        source,
        steps=steps,
        batch=4 if quick else 16,
        context=shape.context,
        seed=seed,
    ):
        weights = _flat(model).clone()
        loss, gradient = _gradient(probe, weights, ids)
        if before is None:
            first = loss
        else:
            part = _integrate(before, (weights, loss, gradient), probe, ids, halvings=3)
            change.index_add_(0, bucket, part)
            moved.index_add_(0, bucket, (weights - before[0]).abs().double())
        before = (weights, loss, gradient)
        if step % window == 0 and step < steps:
            _load(probe, weights)
            h = mean_estimate(
                GaussNewtonBartlett(Categorical(pairs=0)), probe, ids, draws=draws, seed=1 + step
            )
            flat = torch.cat([t.reshape(-1) for t in h])
            bucket = tenths(flat)
            curvature += torch.zeros_like(curvature).index_add_(0, bucket, flat)
            windows += 1
        if step % 10 == 0:
            progress.check()
            progress.within(step / steps, f"loss {loss:.3f}")
    size = weights.numel() / BUCKETS
    return {
        "first_loss": first,
        "loss": loss,
        "allocated_over_actual": float(change.sum()) / (loss - first),
        "decrease": (-change).tolist(),
        "distance_a_step": (moved / size / steps).tolist(),
        "curvature": (curvature / size / windows).tolist(),
    }


Place = tuple[Tensor, float, Tensor]
"""Weights, the loss there, its gradient."""


def _integrate(start: Place, end: Place, probe: nn.Module, ids: Tensor, *, halvings: int) -> Tensor:
    """Each coordinate's part of the change between two places. A stretch whose parts do not add up to its
    change, within 2% and 1e-4, is halved.
    """
    weights = (start[0] + end[0]) / 2
    middle: Place = (weights, *_gradient(probe, weights, ids))
    parts = simpson(end[0] - start[0], start[2], middle[2], end[2])
    change = end[1] - start[1]
    if halvings == 0 or abs(float(parts.sum()) - change) <= 0.02 * abs(change) + 1e-4:
        return parts
    return _integrate(start, middle, probe, ids, halvings=halvings - 1) + _integrate(
        middle, end, probe, ids, halvings=halvings - 1
    )


def simpson(delta: Tensor, start: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """Each coordinate's part of the change of the loss along a step, float64."""
    return delta.double() * (start.double() + 4 * middle.double() + end.double()) / 6


def tenths(h: Tensor) -> Tensor:
    """The tenth, 0 (flattest) to 9, of each coordinate by the rank of its curvature."""
    rank = torch.empty(len(h), dtype=torch.int64)
    rank[h.argsort(stable=True)] = torch.arange(len(h))
    return rank * BUCKETS // len(h)


def _gradient(probe: nn.Module, weights: Tensor, ids: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of the held-out sequences. On a model of its own: the optimizer may be listening to
    the other.
    """
    _load(probe, weights)
    loss = probe(input_ids=ids, labels=ids).loss
    loss.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in probe.parameters() if p.grad is not None])
    for parameter in probe.parameters():
        parameter.grad = None
    return float(loss.detach()), gradient


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _load(probe: nn.Module, weights: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(weights[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
