"""The Triton kernel of ``fused_cuda``: one launch for all tensors. Imported at its first use alone, as it
imports triton, which comes with the CUDA builds of torch and not with the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sophia_step"]


@triton.jit
def sophia_step(
    table,  # int64 (6, count): addresses of theta, g, m, h; number of elements; number of the first block
    count,
    lr,  # a number, or the address of one
    keep,  # 1 - lr weight_decay, if lr is a number
    one_minus_beta1,
    gamma,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    LR_IS_ADDRESS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HALVINGS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor: which one is found by halving, as a table of blocks would be as long as the
    model.
    """
    block = tl.program_id(0)
    low = 0
    high = count
    for _ in tl.static_range(HALVINGS):
        middle = (low + high) // 2
        begins_before = tl.load(table + 5 * count + middle) <= block
        low = tl.where(begins_before, middle, low)
        high = tl.where(begins_before, high, middle)
    size = tl.load(table + 4 * count + low)
    begin = (block - tl.load(table + 5 * count + low)) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    inside = at < size

    p_begin = tl.load(table + low).to(tl.pointer_type(PARAM))
    g_begin = tl.load(table + count + low).to(tl.pointer_type(GRAD))
    m_begin = tl.load(table + 2 * count + low).to(tl.pointer_type(tl.float32))
    h_begin = tl.load(table + 3 * count + low).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # an address out of memory says nothing about itself; four numbers at a time need this
        p_begin = tl.multiple_of(p_begin, 16)
        g_begin = tl.multiple_of(g_begin, 16)
        m_begin = tl.multiple_of(m_begin, 16)
        h_begin = tl.multiple_of(h_begin, 16)

    p = tl.load(p_begin + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_begin + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_begin + at, mask=inside, other=0.0)
    h = tl.load(h_begin + at, mask=inside, other=1.0)
    if MAXIMIZE:
        g = -g
    if LR_IS_ADDRESS:
        rate = tl.load(lr).to(tl.float32)
        kept = 1 - rate * weight_decay
    else:
        rate = lr
        kept = keep

    m += one_minus_beta1 * (g - m)
    d = tl.maximum(gamma * h, eps, propagate_nan=tl.PropagateNan.ALL)
    # As in the rule a NaN stays one: min and max of a GPU would drop it.
    u = tl.clamp(m / d, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    p = p * kept - rate * u
    tl.store(m_begin + at, m, mask=inside)
    tl.store(p_begin + at, p.to(PARAM), mask=inside)
