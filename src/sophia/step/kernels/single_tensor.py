"""The plain path: one tensor after another, by the direction of any rule.

It is the truth for the faster paths and takes what they do not: odd strides, unusual pairs of dtypes,
differentiable steps, rules that no other path knows.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from sophia.step.rounding import store
from sophia.step.rules import StepSettings
from sophia.step.second_moments import Moment
from sophia.update_rule import average_gradient, look_ahead, rms, usual_size

__all__ = ["step"]


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor | MutableMapping[str, Tensor]],
    settings: StepSettings,
    *,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """Change ``params``, ``exp_avgs``, ``sizes`` and what stands for h in place by one step; the rest is read
    only.

    The arithmetic is done in float32 at least, and what is kept in fewer bits is rounded once, at the end.

    Args:
        params: theta.
        grads: g, one a parameter.
        exp_avgs: m.
        hessians: h; of a rule without curvature the state of each parameter, with its second moments.
        settings: the rule and its numbers.
        sizes: where the rule keeps them, scalars: rms(u) over ``started`` of the step before, 0 if there was
            none (``update_rule.usual_size``); else None.
        keys: of the noise of each parameter, to round m in bfloat16 stochastically; None to round to nearest.
    """
    s, rule = settings, settings.rule
    for i, (param, grad, exp_avg, hessian) in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        wide = torch.promote_types(torch.promote_types(param.dtype, exp_avg.dtype), torch.float32)
        g = (-grad if s.maximize else grad).to(wide)
        m = average_gradient(exp_avg.to(wide), g, beta1=s.beta1)
        if isinstance(hessian, Tensor):
            assert rule.direction is not None
            u = look_ahead(m, g, beta1=s.beta1) if rule.looks_ahead else m
            size = None
            if rule.keeps_rms:
                assert sizes is not None
                now = rms(u)
                size = usual_size(now, sizes[i], started=s.started)
                sizes[i].copy_(now / s.started)
            direction = rule.direction(u, hessian.to(wide), size, s)
        else:
            assert rule.statistics is not None
            moment = Moment(g, m, s.beta1, s.beta2, s.every, s.damping, s.eps)
            direction = rule.statistics.direction(hessian, moment)
        # A graph through the step (to a tensor lr, say) needs the parameter as it was before it is stored.
        theta = param.to(wide, copy=torch.is_grad_enabled())
        # In half precision 1 - lr wd would be 1: no decay.
        lr = s.lr.to(torch.promote_types(s.lr.dtype, wide)) if isinstance(s.lr, Tensor) else s.lr
        theta = theta * (1 - lr * s.weight_decay) - lr * s.scale * direction
        key = None if keys is None else keys[i]
        store(exp_avg, m, key)
        store(param, theta, key if s.stochastic else None, upper=True)
