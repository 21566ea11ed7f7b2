"""The spectral rule for hidden matrices on a CPU: compiled passes over memory around products in bfloat16.

rows, columns       squares of u, summed; m is averaged on the way
y = R^-p u C^-p     in bfloat16, R and C relative to their mean
d = polar(y)        by products on the short side (step/polar.py)
theta               moves by lr, along R^-p d C^-p at the rms of one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sophia.step.kernels import fused_cpu, in_place
from sophia.step.polar import iterated, multiplies_bfloat16
from sophia.step.rules import SPECTRAL, StepSettings
from sophia.step.second_moments import Equilibrated
from sophia.update_rule import relative

__all__ = ["IMPLEMENTED", "applies", "step"]

IMPLEMENTED = (SPECTRAL,)
"""Rules that this path knows."""


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor) -> bool:
    """Whether these are plain matrices of float32, row by row in the memory of a CPU with such products."""
    if not multiplies_bfloat16(param.device) or not in_place.applies(param, grad, exp_avg):
        return False
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (param, grad, exp_avg))


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Mapping[str, Tensor]],
    settings: StepSettings,
    *,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """As ``single_tensor.step``, for what ``applies`` to; of the states nothing is read."""
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        if p.numel():
            _move(p, g, m, settings)
    torch.autograd.graph.increment_version([*params, *exp_avgs])


def _move(p: Tensor, g: Tensor, m: Tensor, s: StepSettings) -> None:
    library = fused_cpu.library()
    rows, columns = p.shape
    b1, a = s.beta1, s.beta1 - 1 if s.maximize else 1 - s.beta1
    row = torch.empty(rows, dtype=torch.float64)
    column = torch.zeros(min(rows, fused_cpu.threads_for(p.numel())), columns, dtype=torch.float64)

    def in_rows(call: Callable[..., None], *before: int, after: Sequence[float | int] = ()) -> None:
        fused_cpu.in_parts(
            lambda i, begin, end: call(*before, columns, begin, end, *after), rows, len(column)
        )

    fused_cpu.in_parts(
        lambda i, begin, end: library.sophia_matrix_squares(
            m.data_ptr(), g.data_ptr(), columns, begin, end, b1, a, row.data_ptr(), column[i].data_ptr()
        ),
        rows,
        len(column),
    )
    assert isinstance(s.rule.statistics, Equilibrated)
    power = s.rule.statistics.power
    r, c = ((relative(squares, 0.0) ** -power).float() for squares in (row, column.sum(0)))
    size = math.sqrt(float(row.sum()))
    lift = math.ldexp(1.0, max(-126, min(126, -math.frexp(size)[1])))
    y = torch.empty(rows, columns, dtype=torch.bfloat16)
    in_rows(
        library.sophia_matrix_scaled,
        y.data_ptr(),
        m.data_ptr(),
        g.data_ptr(),
        after=(b1, a, lift, r.data_ptr(), c.data_ptr()),
    )
    d = iterated(y) if rows <= columns else iterated(y.T).T.contiguous()
    in_rows(library.sophia_matrix_norms, d.data_ptr(), after=(r.data_ptr(), c.data_ptr(), row.data_ptr()))
    size, rate = math.sqrt(float(row.sum())), float(s.lr)
    r *= rate * s.scale * math.sqrt(p.numel()) / size if size else 0.0  # a tensor of zeros does not move
    decay = 1 - rate * s.weight_decay
    in_rows(
        library.sophia_matrix_move,
        p.data_ptr(),
        d.data_ptr(),
        after=(decay, r.data_ptr(), c.data_ptr()),
    )
