"""The published rule over lists of tensors, with the fewest passes over memory.

For d > 0,  clip(m / d, 1) = m / max(d, |m|) :  one division less to store and no clamp afterwards. A step is

    m     <- m + (1 - beta1) (g - m)
    d     =  max(gamma h, eps, |m|)
    theta <- (1 - lr wd) theta
    theta <- theta - lr m / d

On a CPU the lists are cut into blocks that stay in a core's cache between the passes: faster than whole
tensors, and the temporaries are a few hundred kilobytes instead of two copies of the model. On a GPU each
pass is one launch for all tensors.

Where parameters or state have fewer than 32 bits, a block is widened to float32 first and rounded when it is
written back.

For finite numbers the result is the rule's up to rounding. An infinite m gives NaN here and a step of lr
there: in both cases training is over, and here it shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sophia.step.flat_views import flat, is_dense
from sophia.step.rounding import moved, store
from sophia.step.rules import PAPER, StepSettings

__all__ = ["IMPLEMENTED", "applies", "in_step", "step"]

IMPLEMENTED = (PAPER,)
"""Rules that this path knows."""

_KINDS = (torch.nn.Parameter, Tensor)  # a subclass may mean something else by its memory
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {  # of parameters and of their state
    *((weight, state) for weight in _WEIGHTS for state in (torch.float32, torch.bfloat16, torch.float64)),
    (torch.float64, torch.float64),
}
_BLOCK = 2**16  # elements a thread: five float32 operands of them fit in a megabyte of a core's cache


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four can be walked through as flat memory: known dtypes, one device, and equal dense
    strides.
    """
    device = param.device
    return (
        (param.dtype, exp_avg.dtype) in _DTYPES
        and grad.device == exp_avg.device == hessian.device == device
        and in_step(param, grad, exp_avg, hessian)
    )


def in_step(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four, on one device, have their coordinates in one order, in a dtype of two by two."""
    # Asked for every parameter at every step, so the usual case, all contiguous, comes first and cheap.
    if grad.dtype is not param.dtype or hessian.dtype is not exp_avg.dtype:
        return False
    if type(grad) is not Tensor or type(exp_avg) is not Tensor or type(hessian) is not Tensor:
        return False
    if type(param) not in _KINDS or param.layout != torch.strided:
        return False
    if param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and hessian.is_contiguous():
        return True
    stride = param.stride()
    return stride == grad.stride() == exp_avg.stride() == hessian.stride() and is_dense(param)


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    settings: StepSettings,
    *,
    sizes: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """As ``single_tensor.step``; all tensors of one device and one pair of dtypes, and such that ``applies``
    holds.
    """
    s = settings
    for p, g, m, h, noise in _pieces(params, grads, exp_avgs, hessians, keys):
        wide = torch.promote_types(torch.promote_types(p[0].dtype, m[0].dtype), torch.float32)
        theta, mean, g = _widened(p, wide), _widened(m, wide), _widened(g, wide)
        if s.maximize:
            g = list(torch._foreach_neg(g))
        torch._foreach_lerp_(mean, g, 1 - s.beta1)
        d = torch._foreach_mul(_widened(h, wide), s.gamma)
        torch._foreach_clamp_min_(d, s.eps)
        torch._foreach_maximum_(d, torch._foreach_abs(mean))
        if isinstance(s.lr, Tensor):
            # A tensor lr stays a tensor (no synchronisation), at the price of one more pass. In its own half
            # precision 1 - lr wd would be 1: no decay.
            rate = s.lr.to(p[0].device, torch.promote_types(s.lr.dtype, wide))
            torch._foreach_mul_(theta, 1 - rate * s.weight_decay)
            direction = torch._foreach_div(mean, d)
            torch._foreach_mul_(direction, rate)
            torch._foreach_sub_(theta, direction)
        else:
            if s.weight_decay != 0:
                torch._foreach_mul_(theta, 1 - s.lr * s.weight_decay)
            torch._foreach_addcdiv_(theta, mean, d, value=-s.lr)
        # By dtype: torch.compile of 2.6 compares the elements of two lists where it is asked for identity.
        if m[0].dtype != wide:
            _stored(m, mean, noise)
        if p[0].dtype != wide:
            _stored(p, theta, noise if s.stochastic else None, upper=True)


def _widened(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same list if it has the dtype already, else copies."""
    if tensors[0].dtype == dtype:
        return tensors
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _stored(
    targets: list[Tensor], values: list[Tensor], keys: list[int] | None, *, upper: bool = False
) -> None:
    if keys is None or targets[0].dtype != torch.bfloat16:
        torch._foreach_copy_(targets, values)
        return
    for target, value, key in zip(targets, values, keys, strict=True):
        store(target, value, key, upper=upper)


_Piece = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int] | None]


def _pieces(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    keys: Sequence[int] | None,
) -> Iterator[_Piece]:
    """The lists whole on an accelerator or in a graph; on a CPU, tuples of blocks, small tensors gathered in
    one list.
    """
    if not params:
        return
    if params[0].device.type != "cpu" or torch.compiler.is_compiling():  # a compiler fuses passes itself
        yield list(params), list(grads), list(exp_avgs), list(hessians), None if keys is None else list(keys)
        return
    block = _BLOCK * torch.get_num_threads()  # each pass over it waits for all threads
    gathered: _Piece = ([], [], [], [], None if keys is None else [])
    size = 0
    for i, tensors in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        flats = [flat(t) for t in tensors]
        count = flats[0].numel()
        if count > block:
            columns = [torch.split(t, block) for t in flats]
            for number, (p, g, m, h) in enumerate(zip(*columns, strict=True)):
                key = None if keys is None else [moved(keys[i], number * block)]
                yield [p], [g], [m], [h], key
            continue
        for pile, tensor in zip(gathered[:4], flats, strict=True):
            pile.append(tensor)
        if keys is not None and gathered[4] is not None:
            gathered[4].append(keys[i])
        size += count
        if size >= block:
            yield gathered
            gathered, size = ([], [], [], [], None if keys is None else []), 0
    if gathered[0]:
        yield gathered
