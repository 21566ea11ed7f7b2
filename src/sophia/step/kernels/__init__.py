"""The rules of ``step/rules.py`` applied in place to lists of tensors; each path is held to them by a test.

single_tensor      one tensor after another, by the rule itself: any rule, layout, dtype, tensor lr,
                   differentiable
foreach            few passes over lists of dense tensors
damped_blocks      the damped rule, dense tensors on a CPU
fused_cpu          one pass, compiled, on a CPU; for the damped rule too
matrices_cpu       the spectral rule's hidden matrices: compiled passes around products, on a CPU
in_place           rules without curvature, tensor by tensor, with fewer passes over memory
fused_cuda         one launch, in Triton, on a GPU; by fused=True alone
average_curvature  the average of h

The arithmetic is that of float32, or of float64 where the parameter or its state has it. Half-precision
parameters are rounded once, at the end; to nearest unless stochastic rounding was asked for. State in
bfloat16 is always rounded stochastically (``rounding.py``), from ``keys``, one a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from sophia.step.kernels import (
    damped_blocks,
    foreach,
    fused_cpu,
    fused_cuda,
    in_place,
    matrices_cpu,
    single_tensor,
)
from sophia.step.rules import Rule

__all__ = ["choose"]


def choose(rule: Rule, group: Mapping[str, Any], lr: float | Tensor, row: tuple[Tensor, ...]) -> ModuleType:
    """The fastest path that knows the rule, takes this parameter, its gradient and its state, and that the
    group allows.

    As in torch, ``foreach`` and ``fused`` of the group are True (this path, where it can serve), False (never
    this path) or None (choose).
    """
    if group["differentiable"]:
        return single_tensor
    number = not isinstance(lr, Tensor)
    if not rule.has_curvature:
        return _without_curvature(rule, group, row) if number else single_tensor
    # Asked for every tensor at every step: the cheap conditions come first.
    if (
        rule in fused_cpu.IMPLEMENTED
        # The compiled loop takes lr by value: a tensor lr that must stay one goes another way.
        and number
        and (group["fused"] or (group["fused"] is None and group["foreach"] is None))
        and not fused_cpu.unavailable()
        and fused_cpu.applies(*row)
    ):
        return fused_cpu
    if (
        group["fused"]
        and rule in fused_cuda.IMPLEMENTED
        and fused_cuda.applies(*row)
        and (number or lr.device == row[0].device)  # type: ignore[union-attr]
        and not fused_cuda.unavailable(row[0].device)
    ):
        return fused_cuda
    if group["foreach"] is False:
        return single_tensor
    if rule in foreach.IMPLEMENTED and foreach.applies(*row):
        return foreach
    if rule in damped_blocks.IMPLEMENTED and number and not group["maximize"] and damped_blocks.applies(*row):
        return damped_blocks
    return single_tensor


def _without_curvature(rule: Rule, group: Mapping[str, Any], row: tuple[Any, ...]) -> ModuleType:
    if rule not in in_place.IMPLEMENTED or group["foreach"] is False or not in_place.applies(*row[:3]):
        return single_tensor
    asked = group["fused"] is not False and group["foreach"] is None
    if not asked or rule not in matrices_cpu.IMPLEMENTED or not matrices_cpu.applies(*row[:3]):
        return in_place
    return in_place if fused_cpu.unavailable() else matrices_cpu
