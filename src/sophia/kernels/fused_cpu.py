"""The rule in one pass over memory on a CPU: a compiled C loop, called through ctypes for all tensors at
once.

The library ``_fused_cpu.so`` is built when the package is installed, if there is a C compiler; without it the
foreach path serves. It needs no torch header and no OpenMP: the work is cut into equal parts, one a thread of
``torch.get_num_threads()``, and ctypes lets the threads run side by side.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sophia.kernels import foreach

__all__ = ["applies", "step", "unavailable"]

_LEAST = 2**15  # elements that are worth a thread of their own


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    path = Path(__file__).with_name("_fused_cpu.so")
    if not path.exists():
        return "the compiled kernel is not there: the package was installed where no C compiler was found"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled kernel cannot be loaded ({error})"
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.sophia_step.argtypes = [count, *[pointer] * 5, *[count] * 2, *[number] * 6]
    library.sophia_step.restype = None
    return library


def unavailable() -> str | None:
    """Why this path cannot run here, or None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four can be walked through as flat float32 memory of a CPU."""
    return (
        param.dtype == torch.float32
        and param.device.type == "cpu"
        and foreach.applies(param, grad, exp_avg, hessian)
    )


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
    """As ``single_tensor.step``; all tensors such that ``applies`` holds."""
    library = _library()
    assert not isinstance(library, str), library
    rate = float(lr)
    lengths = array("q", [p.numel() for p in params])
    # Addresses are taken anew each step: gradients move when they are set to None.
    table = [array("q", [t.data_ptr() for t in column]) for column in (params, grads, exp_avgs, hessians)]
    total = sum(lengths)

    def part(begin: int, end: int) -> None:
        library.sophia_step(
            len(lengths),
            lengths.buffer_info()[0],
            *(column.buffer_info()[0] for column in table),
            begin,
            end,
            -1.0 if maximize else 1.0,
            beta1,
            rate,
            1 - rate * weight_decay,
            gamma,
            eps,
        )

    threads = max(1, min(torch.get_num_threads(), total // _LEAST))
    # Multiples of a cache line, so that no two threads write into one.
    edges = [total * i // threads // 16 * 16 for i in range(threads)] + [total]
    waiting = [_pool().submit(part, *edges[i : i + 2]) for i in range(1, threads)]
    part(*edges[:2])
    for future in waiting:
        future.result()
    # The C loop is invisible to autograd: tell it that these have changed, as an in-place operation would.
    torch.autograd.graph.increment_version([*params, *exp_avgs])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="sophia")


# A forked child inherits the pool without its threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
