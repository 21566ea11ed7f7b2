"""The rule over lists of tensors, with the fewest passes over memory.

For d > 0,  clip(m / d, 1) = m / max(d, |m|) :  one division less to store and no clamp afterwards. A step is

    m     <- m + (1 - beta1) (g - m)
    d     =  max(gamma h, eps, |m|)
    theta <- (1 - lr wd) theta
    theta <- theta - lr m / d

On a CPU the lists are cut into blocks that stay in a core's cache between the passes: faster than whole
tensors, and the temporaries are a few hundred kilobytes instead of two copies of the model. On a GPU each
pass is one launch for all tensors.

For finite numbers the result is the rule's up to rounding. An infinite m gives NaN here and a step of lr
there: in both cases training is over, and here it shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["applies", "step"]

_KINDS = (torch.nn.Parameter, Tensor)  # a subclass may mean something else by its memory
_DTYPES = (torch.float32, torch.float64)
_BLOCK = 2**16  # elements: five float32 operands of a block fit in a megabyte of cache


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four can be walked through as flat memory: one dtype, one device, and equal dense
    strides.
    """
    # Asked for every parameter at every step, so the usual case, all contiguous, comes first and cheap.
    dtype, device = param.dtype, param.device
    for tensor in (grad, exp_avg, hessian):
        if tensor.dtype != dtype or tensor.device != device or type(tensor) is not Tensor:
            return False
    if type(param) not in _KINDS or dtype not in _DTYPES or param.layout != torch.strided:
        return False
    if param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and hessian.is_contiguous():
        return True
    stride = param.stride()
    return stride == grad.stride() == exp_avg.stride() == hessian.stride() and _dense(param)


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
) -> None:
    """As ``single_tensor.step``; all tensors of one dtype and device for which ``applies`` holds."""
    for p, g, m, h in _pieces(params, grads, exp_avgs, hessians):
        if maximize:
            g = list(torch._foreach_neg(g))
        torch._foreach_lerp_(m, g, 1 - beta1)
        d = torch._foreach_mul(h, gamma)
        torch._foreach_clamp_min_(d, eps)
        torch._foreach_maximum_(d, torch._foreach_abs(m))
        if isinstance(lr, Tensor):
            # A tensor lr stays a tensor (no synchronisation), at the price of one more pass. In its own half
            # precision 1 - lr wd would be 1: no decay.
            rate = lr.to(p[0].device, torch.promote_types(lr.dtype, p[0].dtype))
            torch._foreach_mul_(p, 1 - rate * weight_decay)
            direction = torch._foreach_div(m, d)
            torch._foreach_mul_(direction, rate)
            torch._foreach_sub_(p, direction)
        else:
            if weight_decay != 0:
                torch._foreach_mul_(p, 1 - lr * weight_decay)
            torch._foreach_addcdiv_(p, m, d, value=-lr)


def _pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The lists whole on an accelerator or in a graph; on a CPU, tuples of blocks, small tensors gathered in
    one list.
    """
    if not lists[0]:
        return
    if (
        lists[0][0].device.type != "cpu" or torch.compiler.is_compiling()
    ):  # a compiler fuses the passes itself
        yield tuple(list(tensors) for tensors in lists)
        return
    gathered: tuple[list[Tensor], ...] = tuple([] for _ in lists)
    size = 0
    for tensors in zip(*lists, strict=True):
        flat = [_flat(t) for t in tensors]
        if flat[0].numel() > _BLOCK:
            yield from (
                tuple([block] for block in blocks)
                for blocks in zip(*(torch.split(t, _BLOCK) for t in flat), strict=True)
            )
            continue
        for pile, tensor in zip(gathered, flat, strict=True):
            pile.append(tensor)
        size += flat[0].numel()
        if size >= _BLOCK:
            yield gathered
            gathered, size = tuple([] for _ in lists), 0
    if gathered[0]:
        yield gathered


def _flat(tensor: Tensor) -> Tensor:
    # Dense tensors of equal strides: walking them in storage order pairs the same coordinates.
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their span of memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
