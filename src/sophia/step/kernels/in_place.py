"""Rules without curvature, one tensor after another, on any device: m and theta are changed where they lie.

The plain path makes a new tensor at each operation of the step; here the momentum takes one pass over memory
and the move another, beside what the rule's own statistics take, and a large table moves piece by piece.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from sophia.step.rules import FACTORED, SPECTRAL, WHITENED, StepSettings
from sophia.step.second_moments import Moment

__all__ = ["IMPLEMENTED", "applies", "step"]

IMPLEMENTED = (SPECTRAL, WHITENED, FACTORED)
"""Rules that this path knows."""

_PLAIN = (torch.nn.Parameter, Tensor)  # a subclass may mean something else by its memory
_WIDE = (torch.float32, torch.float64)


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor) -> bool:
    """Whether these are plain dense tensors of one dtype, float32 or float64: else m or theta is rounded."""
    return param.dtype in _WIDE and all(
        t.dtype == param.dtype and t.layout == torch.strided and type(t) in _PLAIN
        for t in (param, grad, exp_avg)
    )


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[MutableMapping[str, Tensor]],
    settings: StepSettings,
    *,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """As ``single_tensor.step``, for what ``applies`` to."""
    s, statistics = settings, settings.rule.statistics
    assert statistics is not None
    rate = float(s.lr)
    for p, grad, m, kept in zip(params, grads, exp_avgs, hessians, strict=True):
        g = -grad if s.maximize else grad
        m.lerp_(g, 1 - s.beta1)
        seen = Moment(g, m, s.beta1, s.beta2, s.every, s.damping, s.eps)
        for place, d in statistics.pieces(kept, seen):
            p[place].mul_(1 - rate * s.weight_decay).sub_(d, alpha=rate * s.scale)
