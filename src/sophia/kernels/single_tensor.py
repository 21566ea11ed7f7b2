"""The plain path: one tensor after another, by calling the rule itself.

It is the truth for the faster paths and takes what they do not: mixed dtypes, odd strides, differentiable
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.update_rule import sophia_step

__all__ = ["step"]


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Change ``params`` and ``exp_avgs`` in place by one step; the gradients and ``hessians`` are read only.

    The arithmetic is done in the dtype of the state, so a half-precision parameter is rounded once, at the
    end.
    """
    for param, grad, exp_avg, hessian in zip(params, grads, exp_avgs, hessians, strict=True):
        wide = torch.promote_types(param.dtype, exp_avg.dtype)
        theta, m = sophia_step(
            # A graph through the step (to a tensor lr, say) needs the parameter as it was before copy_ below.
            param.to(wide, copy=torch.is_grad_enabled()),
            (-grad if maximize else grad).to(wide),
            exp_avg.to(wide),
            hessian.to(wide),
            lr=lr,
            beta1=beta1,
            gamma=gamma,
            eps=eps,
            weight_decay=weight_decay,
        )
        exp_avg.copy_(m)
        param.copy_(theta)
