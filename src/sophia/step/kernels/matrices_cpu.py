"""The spectral rule for hidden matrices on a CPU: compiled passes over memory around products in bfloat16.

rows, columns       squares of u, summed; m is averaged on the way
y = R^-p u C^-p     in bfloat16, R and C relative to their mean
d = polar(y)        by products on the short side (step/polar.py)
theta               moves by lr, along R^-p d C^-p at the rms of one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

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

_TOGETHER = 2**19
"""Numbers of the matrices whose products are made together: with more they leave the cache."""


class _Matrix(NamedTuple):
    p: Tensor
    g: Tensor
    m: Tensor


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
    for batch in _batches(params, grads, exp_avgs):
        _move(batch, settings)
    torch.autograd.graph.increment_version([*params, *exp_avgs])


def _batches(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]
) -> Iterator[list[_Matrix]]:
    """Matrices of one shape, whose products are made together: small ones take longer one by one."""
    by_shape: dict[torch.Size, list[_Matrix]] = {}
    for matrix in map(_Matrix, params, grads, exp_avgs):
        by_shape.setdefault(matrix.p.shape, []).append(matrix)
    for shape, same in by_shape.items():
        many = max(1, _TOGETHER // max(shape.numel(), 1))
        yield from (same[i : i + many] for i in range(0, len(same), many) if shape.numel())


def _move(batch: Sequence[_Matrix], s: StepSettings) -> None:
    rows, columns = batch[0].p.shape
    y = torch.empty(len(batch), rows, columns, dtype=torch.bfloat16)
    whitening = [_whitened(part, matrix, s) for part, matrix in zip(y, batch, strict=True)]
    if len(batch) == 1:
        y = y[0]  # products of two matrices take a transposed one as it is, batched ones copy it
    d = iterated(y) if rows <= columns else iterated(y.mT).mT.contiguous()
    for part, matrix, (r, c) in zip(d.view(len(batch), rows, columns), batch, whitening, strict=True):
        _moved(part, matrix.p, r, c, s)


def _whitened(y: Tensor, matrix: _Matrix, s: StepSettings) -> tuple[Tensor, Tensor]:
    """Average m, write R^-p u C^-p times a power of two into y; return R^-p and C^-p."""
    library, (_, g, m) = fused_cpu.library(), matrix
    rows, columns = m.shape
    b1, a = s.beta1, s.beta1 - 1 if s.maximize else 1 - s.beta1
    row = torch.empty(rows, dtype=torch.float64)
    column = torch.zeros(min(rows, fused_cpu.threads_for(m.numel())), columns, dtype=torch.float64)
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
    _in_rows(
        library.sophia_matrix_scaled,
        m,
        y.data_ptr(),
        m.data_ptr(),
        g.data_ptr(),
        after=(b1, a, lift, r.data_ptr(), c.data_ptr()),
    )
    return r, c


def _moved(d: Tensor, p: Tensor, r: Tensor, c: Tensor, s: StepSettings) -> None:
    """Move p along r d c, at the rms of one."""
    library, squares = fused_cpu.library(), torch.empty(len(p), dtype=torch.float64)
    _in_rows(
        library.sophia_matrix_norms,
        p,
        d.data_ptr(),
        after=(r.data_ptr(), c.data_ptr(), squares.data_ptr()),
    )
    size, rate = math.sqrt(float(squares.sum())), float(s.lr)
    r *= rate * s.scale * math.sqrt(p.numel()) / size if size else 0.0  # a tensor of zeros does not move
    decay = 1 - rate * s.weight_decay
    _in_rows(
        library.sophia_matrix_move, p, p.data_ptr(), d.data_ptr(), after=(decay, r.data_ptr(), c.data_ptr())
    )


def _in_rows(call: Callable[..., None], of: Tensor, *before: int, after: Sequence[float | int]) -> None:
    """Call for ranges of the rows of a matrix, a thread each."""
    rows, columns = of.shape
    threads = min(rows, fused_cpu.threads_for(of.numel()))
    fused_cpu.in_parts(lambda i, begin, end: call(*before, columns, begin, end, *after), rows, threads)
