"""The damped rule on a CPU without the compiled kernel, in blocks that stay in a core's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sophia.step.flat_views import flat
from sophia.step.kernels import foreach
from sophia.step.rules import DAMPED, StepSettings

__all__ = ["IMPLEMENTED", "applies", "step"]

IMPLEMENTED = (DAMPED,)
"""Rules that this path knows."""

_BLOCK = 2**16  # elements, as in foreach.py


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four are dense in one order on a CPU, and in the dtype of the arithmetic."""
    return (
        param.is_cpu
        and param.dtype == exp_avg.dtype
        and param.dtype in (torch.float32, torch.float64)
        and foreach.applies(param, grad, exp_avg, hessian)
    )


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    settings: StepSettings,
    *,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """As ``single_tensor.step``, for the rules of ``IMPLEMENTED`` where ``applies`` holds.

    lr is a number, and nothing is rounded stochastically in these dtypes.
    """
    assert sizes is not None
    for row, size in zip(zip(params, grads, exp_avgs, hessians, strict=True), sizes, strict=True):
        _step_of_one(*row, size, settings)


def _step_of_one(
    param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor, size: Tensor, s: StepSettings
) -> None:
    rate, new = float(s.lr), 1 - s.beta1
    usual, squares = float(size) * s.started, 0.0
    if not usual > 0:  # no step before this one: its own rms, at the cost of one more pass
        pieces = _blocks(flat(exp_avg), flat(grad))
        squares = sum(float(m.lerp(g, new).lerp_(g, new).square().sum()) for m, g in pieces)
        usual, squares = math.sqrt(squares / max(param.numel(), 1)), 0.0
    floor = max(s.damping * usual, s.eps)
    for p, g, m, h in _blocks(*map(flat, (param, grad, exp_avg, hessian))):
        m.lerp_(g, new)
        u = m.lerp(g, new)
        squares += float(u.square().sum())
        # For d > 0, clip(u / d, 1) = u / max(d, |u|).
        d = torch.mul(h, s.gamma).clamp_min_(floor)
        torch.maximum(d, u.abs(), out=d)
        p.mul_(1 - rate * s.weight_decay).addcdiv_(u, d, value=-rate * s.scale)
    size.fill_(math.sqrt(squares / max(param.numel(), 1)) / s.started)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding pieces, cut along the first dimension."""
    length = max(1, _BLOCK // max(1, tensors[0][:1].numel()))
    return zip(*(torch.split(t, length) for t in tensors), strict=True)
