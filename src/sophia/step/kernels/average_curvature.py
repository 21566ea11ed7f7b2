"""The average of the curvature, ``h <- beta2 h + (1 - beta2) h_hat``, in place and in the precision of h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.step.flat_views import flat, is_dense
from sophia.step.kernels import fused_cpu
from sophia.step.rounding import moved, store
from sophia.update_rule import average_curvature

__all__ = ["average"]

_BLOCK = 2**20  # elements: h in bfloat16 is widened piece by piece, not as a whole


def average(hessian: Tensor, diagonal: Tensor | None, *, beta2: float, key: int | None) -> None:
    """Average ``diagonal`` (None for zero) into ``hessian``, plain tensors of one shape.

    Args:
        hessian: h; in bfloat16 it is rounded stochastically.
        diagonal: h_hat, of any layout and floating dtype, not changed.
        beta2: decay of h.
        key: of the noise; needed for bfloat16 alone.
    """
    if diagonal is not None:
        diagonal = diagonal.detach().to(hessian.device)
    if hessian.dtype != torch.bfloat16:
        if diagonal is None:
            hessian.mul_(beta2)
        else:
            hessian.lerp_(diagonal.to(hessian.dtype), 1 - beta2)
        return
    assert key is not None, "h in bfloat16 is rounded stochastically: that needs a key"
    if diagonal is not None and (diagonal.dtype != torch.float32 or diagonal.stride() != hessian.stride()):
        diagonal = torch.empty_like(hessian, dtype=torch.float32).copy_(diagonal)
    if fused_cpu.averages(hessian, diagonal):
        fused_cpu.average(hessian, diagonal, beta2=beta2, key=key)
        return
    in_order = is_dense(hessian)
    parts = torch.split(flat(hessian), _BLOCK) if in_order else (hessian,)
    news: Sequence[Tensor | None] = [None] * len(parts)
    if diagonal is not None:
        news = torch.split(flat(diagonal), _BLOCK) if in_order else (diagonal,)
    for number, (part, new) in enumerate(zip(parts, news, strict=True)):
        wide = part.to(torch.float32)
        wide = beta2 * wide if new is None else average_curvature(wide, new, beta2=beta2)
        store(part, wide, moved(key, number * _BLOCK))
