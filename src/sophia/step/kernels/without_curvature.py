"""The step of the rules that have statistics of their own in place of h, one tensor after another."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from sophia.step.rounding import store
from sophia.step.rules import StepSettings
from sophia.step.second_moments import Moment
from sophia.update_rule import average_gradient

__all__ = ["step"]


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    states: Sequence[MutableMapping[str, Tensor]],
    settings: StepSettings,
    *,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """As ``single_tensor.step``, with the state of each parameter in the place of h; it is changed too."""
    s, statistics = settings, settings.rule.statistics
    assert statistics is not None
    for i, (param, grad, exp_avg, kept) in enumerate(zip(params, grads, exp_avgs, states, strict=True)):
        wide = torch.promote_types(torch.promote_types(param.dtype, exp_avg.dtype), torch.float32)
        g = (-grad if s.maximize else grad).to(wide)
        m = average_gradient(exp_avg.to(wide), g, beta1=s.beta1)
        kept["steps"] += 1
        direction = statistics.direction(kept, Moment(g, m, s.beta1, s.beta2, s.every, s.damping, s.eps))
        lr = s.lr.to(torch.promote_types(s.lr.dtype, wide)) if isinstance(s.lr, Tensor) else s.lr
        theta = param.to(wide) * (1 - lr * s.weight_decay) - lr * s.scale * direction
        key = None if keys is None else keys[i]
        store(exp_avg, m, key)
        store(param, theta, key if s.stochastic else None, upper=True)
