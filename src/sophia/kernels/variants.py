"""The rules "damped" and "spectral" of ``update_rule.py``, in place, one tensor after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.update_rule import average_gradient, damped_direction, look_ahead, spectral_direction

__all__ = ["step"]


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
) -> None:
    """Change ``params`` and ``exp_avgs`` in place by one step of ``rule``; ``gamma`` is already corrected.

    A tensor that is no matrix is moved by the damped rule, whatever ``rule`` says.
    """
    for param, grad, exp_avg, hessian in zip(params, grads, exp_avgs, hessians, strict=True):
        wide = torch.promote_types(param.dtype, exp_avg.dtype)
        g = (-grad if maximize else grad).to(wide)
        m, h = exp_avg.to(wide), hessian.to(wide)
        if torch.is_grad_enabled():
            m = average_gradient(m, g, beta1=beta1)
        else:
            m = m.lerp_(g, 1 - beta1)
        u = look_ahead(m, g, beta1=beta1)
        if rule == "spectral" and param.ndim == 2:
            direction = spectral_direction(u, h)
        else:
            direction = damped_direction(u, h, gamma=gamma, eps=eps, damping=damping)
        theta = param.to(wide, copy=torch.is_grad_enabled())
        theta = theta * (1 - lr * weight_decay) - lr * scale * direction
        exp_avg.copy_(m)
        param.copy_(theta)
