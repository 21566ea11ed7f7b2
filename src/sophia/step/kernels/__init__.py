"""The rule of ``update_rule.py`` applied in place to lists of tensors; each path is held to it by a test.

single_tensor   one tensor after another, by the rule itself: any layout, dtype, tensor lr, differentiable
foreach         few passes over lists of dense tensors
variants        the rules "damped" and "spectral", tensor by tensor
short_side      the polar factor of the spectral rule with fewer products
fused_cpu       one pass, compiled, on a CPU; for the damped rule too
fused_cuda      one launch, in Triton, on a GPU; by fused=True alone
curvature       the average of h

The arithmetic is that of float32, or of float64 where the parameter or its state has it. Half-precision
parameters are rounded once, at the end; to nearest unless stochastic rounding was asked for. State in
bfloat16 is always rounded stochastically (``rounding.py``), from ``keys``, one a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from sophia.step.kernels import foreach, fused_cpu, fused_cuda, own_rules, single_tensor

__all__ = ["choose"]


def choose(group: Mapping[str, Any], lr: float | Tensor, row: tuple[Tensor, ...]) -> ModuleType:
    """The fastest path that takes this parameter, its gradient and its state, and that the group allows.

    As in torch, ``foreach`` and ``fused`` of the group are True (this path, where it can serve), False (never
    this path) or None (choose).
    """
    published = group["rule"] == "paper"
    if group["differentiable"] or (group["rule"] == "spectral" and row[0].ndim == 2):
        return single_tensor if published else own_rules
    fused_allowed = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    # The compiled loop takes lr by value: a tensor lr that must stay one goes another way.
    if (
        fused_allowed
        and not isinstance(lr, Tensor)
        and not fused_cpu.unavailable()
        and fused_cpu.applies(*row)
    ):
        return fused_cpu
    if not published:
        return own_rules
    if (
        group["fused"]
        and fused_cuda.applies(*row)
        and not (isinstance(lr, Tensor) and lr.device != row[0].device)
        and not fused_cuda.unavailable(row[0].device)
    ):
        return fused_cuda
    return foreach if group["foreach"] is not False and foreach.applies(*row) else single_tensor
