"""The rules "damped" and "spectral" of ``update_rule.py``, in place, one tensor after another.

Dense tensors under the damped rule are walked through in blocks that stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sophia.step.flat_views import flat
from sophia.step.kernels import foreach
from sophia.step.kernels.polar import polar_of
from sophia.step.rounding import store
from sophia.update_rule import (
    average_gradient,
    damped_direction,
    look_ahead,
    rms,
    spectral_direction,
    usual_size,
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
    started: float,
    weight_decay: float,
    maximize: bool,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
    stochastic: bool = False,
) -> None:
    """Change ``params``, ``exp_avgs`` and ``sizes`` in place by one step of ``rule``.

    ``gamma`` is already corrected. ``started`` is this step's, and ``sizes`` hold, for each tensor, rms(u)
    over it of the step before (``usual_size``); None if all go by the spectral rule. A tensor that is no
    matrix is moved by the damped rule, whatever ``rule`` says. The rest is as in ``single_tensor.step``.
    """
    for i, row in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        spectral = rule == "spectral" and row[0].ndim == 2
        wide = torch.promote_types(torch.promote_types(row[0].dtype, row[2].dtype), torch.float32)
        dense = row[0].device.type == "cpu" and foreach.applies(*row) and not torch.is_grad_enabled()
        dense = dense and row[0].dtype == row[2].dtype == wide
        if dense and sizes is not None and not (spectral or maximize or isinstance(lr, Tensor)):
            decay = 1 - lr * weight_decay
            _damped_in_blocks(*row, sizes[i], lr * scale, beta1, gamma, eps, damping, started, decay)
            continue
        param, grad, exp_avg, hessian = row
        g = (-grad if maximize else grad).to(wide)
        m = average_gradient(exp_avg.to(wide), g, beta1=beta1)
        u, h = look_ahead(m, g, beta1=beta1), hessian.to(wide)
        if spectral:
            # A graph through the step takes the plain way.
            direction = spectral_direction(u, h, polar_of=None if torch.is_grad_enabled() else polar_of)
        else:
            assert sizes is not None
            now = rms(u)
            size = usual_size(now, sizes[i], started=started)
            direction = damped_direction(u, h, size=size, gamma=gamma, eps=eps, damping=damping)
            sizes[i].copy_(now / started)
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
    size: Tensor,
    lr: float,
    beta1: float,
    gamma: float,
    eps: float,
    damping: float,
    started: float,
    decay: float,
) -> None:
    usual, squares = float(size) * started, 0.0
    if not usual > 0:
        pieces = _blocks(flat(exp_avg), flat(grad))
        squares = sum(float(m.lerp(g, 1 - beta1).lerp_(g, 1 - beta1).square().sum()) for m, g in pieces)
        usual, squares = math.sqrt(squares / max(param.numel(), 1)), 0.0
    floor = max(damping * usual, eps)
    for p, g, m, h in _blocks(*map(flat, (param, grad, exp_avg, hessian))):
        m.lerp_(g, 1 - beta1)
        u = m.lerp(g, 1 - beta1)
        squares += float(u.square().sum())
        # For d > 0, clip(u / d, 1) = u / max(d, |u|).
        d = torch.mul(h, gamma).clamp_min_(floor)
        torch.maximum(d, u.abs(), out=d)
        p.mul_(decay).addcdiv_(u, d, value=-lr)
    size.fill_(math.sqrt(squares / max(param.numel(), 1)) / started)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding pieces, cut along the first dimension."""
    length = max(1, _BLOCK // max(1, tensors[0][:1].numel()))
    return zip(*(torch.split(t, length) for t in tensors), strict=True)
