"""The rules "damped" and "spectral" of ``update_rule.py``, in place, one tensor after another.

Dense tensors under the damped rule are walked through in blocks that stay in a core's cache: once for the rms
of u, once for the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sophia.kernels import foreach
from sophia.kernels.short_side import polar_of
from sophia.layout import flat
from sophia.rounding import store
from sophia.update_rule import (
    SAMPLED_ABOVE,
    average_gradient,
    damped_direction,
    look_ahead,
    sample,
    spectral_direction,
)

__all__ = ["step"]

_BLOCK = 2**16  # elements, as in foreach.py


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    *,
    rule: str,
    lr: float | Tensor,
    beta1: float,
    gamma: float,
    eps: float,
    damping: float,
    scale: float,
    weight_decay: float,
    maximize: bool,
    keys: Sequence[int] | None = None,
    stochastic: bool = False,
) -> None:
    """Change ``params`` and ``exp_avgs`` in place by one step of ``rule``; ``gamma`` is already corrected.

    A tensor that is no matrix is moved by the damped rule, whatever ``rule`` says. The rest is as in
    ``single_tensor.step``.
    """
    for i, row in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        spectral = rule == "spectral" and row[0].ndim == 2
        wide = torch.promote_types(torch.promote_types(row[0].dtype, row[2].dtype), torch.float32)
        dense = row[0].device.type == "cpu" and foreach.applies(*row) and not torch.is_grad_enabled()
        dense = dense and row[0].dtype == row[2].dtype == wide
        if dense and not (spectral or maximize or isinstance(lr, Tensor)):
            _damped_in_blocks(*row, lr * scale, beta1, gamma, eps, damping, 1 - lr * weight_decay)
            continue
        param, grad, exp_avg, hessian = row
        g = (-grad if maximize else grad).to(wide)
        m = average_gradient(exp_avg.to(wide), g, beta1=beta1)
        u, h = look_ahead(m, g, beta1=beta1), hessian.to(wide)
        if spectral:
            # A graph through the step takes the plain way.
            direction = spectral_direction(u, h, polar_of=None if torch.is_grad_enabled() else polar_of)
        else:
            direction = damped_direction(u, h, gamma=gamma, eps=eps, damping=damping)
        theta = param.to(wide, copy=torch.is_grad_enabled())  # a graph needs it as it was before it is stored
        theta = theta * (1 - lr * weight_decay) - lr * scale * direction
        key = None if keys is None else keys[i]
        store(exp_avg, m, key)
        store(param, theta, key if stochastic else None, upper=True)


def _damped_in_blocks(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    lr: float,
    beta1: float,
    gamma: float,
    eps: float,
    damping: float,
    decay: float,
) -> None:
    squares, seen = 0.0, 0
    for m, g in _blocks(*(sample(t if t.numel() > SAMPLED_ABOVE else flat(t)) for t in (exp_avg, grad))):
        u = look_ahead(m.lerp(g, 1 - beta1), g, beta1=beta1)
        squares, seen = squares + float(u.square().sum()), seen + u.numel()
    floor = max(damping * math.sqrt(squares / max(seen, 1)), eps)
    for p, g, m, h in _blocks(*map(flat, (param, grad, exp_avg, hessian))):
        m.lerp_(g, 1 - beta1)
        u = m.lerp(g, 1 - beta1)
        # For d > 0, clip(u / d, 1) = u / max(d, |u|).
        d = torch.mul(h, gamma).clamp_min_(floor)
        torch.maximum(d, u.abs(), out=d)
        p.mul_(decay).addcdiv_(u, d, value=-lr)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding pieces, cut along the first dimension."""
    length = max(1, _BLOCK // max(1, tensors[0][:1].numel()))
    return zip(*(torch.split(t, length) for t in tensors), strict=True)
