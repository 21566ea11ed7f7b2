"""The plain path: one tensor after another, by calling the rule itself.

It is the truth for the faster paths and takes what they do not: odd strides, unusual pairs of dtypes,
differentiable steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.step.rounding import store
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
    keys: Sequence[int] | None = None,
    stochastic: bool = False,
) -> None:
    """Change ``params`` and ``exp_avgs`` in place by one step; the gradients and ``hessians`` are read only.

    The arithmetic is done in float32 at least, and what is kept in fewer bits is rounded once, at the end.

    Args:
        params: theta.
        grads: g, one a parameter.
        exp_avgs: m.
        hessians: h.
        lr: the largest move of a coordinate.
        beta1: decay of m.
        gamma: scale of h.
        eps: floor of the denominator.
        weight_decay: decoupled, times lr.
        maximize: go up.
        keys: of the noise of each parameter, to round m in bfloat16 stochastically; None to round to nearest.
        stochastic: round parameters in bfloat16 stochastically as well.
    """
    for i, (param, grad, exp_avg, hessian) in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        wide = torch.promote_types(torch.promote_types(param.dtype, exp_avg.dtype), torch.float32)
        theta, m = sophia_step(
            # A graph through the step (to a tensor lr, say) needs the parameter as it was before.
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
        key = None if keys is None else keys[i]
        store(exp_avg, m, key)
        store(param, theta, key if stochastic else None, upper=True)
