"""The rule in one pass over memory on a CPU: a compiled C loop, called through ctypes for all tensors at
once.

The library ``_fused_cpu.so`` is built when the package is installed, if there is a C compiler; without it the
foreach path serves. It needs no torch header and no OpenMP: the work is cut into equal parts, one a thread of
``torch.get_num_threads()``, and ctypes lets the threads run side by side.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sophia.kernels import foreach
from sophia.layout import is_dense
from sophia.rounding import moved
from sophia.update_rule import EVERY, LINE, SAMPLED_ABOVE

__all__ = ["applies", "average", "averages", "step", "unavailable"]

_VERSION = 3  # of the interface, as in fused_cpu.c
_LEAST = 2**15  # elements that are worth a thread of their own
_SMALL = 2**17  # elements that a core's cache holds: the damped rule walks through them twice on the spot

# Dtypes of parameters and of state, and whether parameters are rounded stochastically: the loops of the
# library by their numbers.
_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
_LOOPS = {
    (_F32, _F32, False): 0,
    (_F64, _F64, False): 1,
    (_BF16, _F32, False): 2,
    (_BF16, _F32, True): 3,
    (_F16, _F32, False): 4,
    (_F32, _BF16, False): 5,
    (_BF16, _BF16, False): 6,
    (_BF16, _BF16, True): 7,
    (_F16, _BF16, False): 8,
}


class _Settings(ctypes.Structure):
    """The numbers of a step, as the library has them."""

    _fields_ = tuple(
        (name, ctypes.c_double)
        for name in ("beta1", "gradient", "lr", "decay", "gamma", "eps", "ahead", "damping")
    )


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
    if not hasattr(library, "sophia_version") or library.sophia_version() != _VERSION:
        return "the compiled kernel belongs to another version of the package: install the package again"
    pointer, count, key, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_double
    library.sophia_step.argtypes = [ctypes.c_int32, count, *[pointer] * 7, *[count] * 2, pointer]
    library.sophia_step.restype = None
    library.sophia_squares.argtypes = [ctypes.c_int32, *[pointer] * 3, count, pointer, *[count] * 2, pointer]
    library.sophia_squares.restype = None
    library.sophia_average.argtypes = [pointer, pointer, count, key, number, number]
    library.sophia_average.restype = None
    return library


def unavailable() -> str | None:
    """Why this path cannot run here, or None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four can be walked through as flat memory of a CPU, in dtypes that the library has."""
    return (
        param.device.type == "cpu"
        and (param.dtype, exp_avg.dtype, False) in _LOOPS
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
    keys: Sequence[int] | None = None,
    stochastic: bool = False,
    rule: str = "paper",
    damping: float = 0.0,
    scale: float = 1.0,
) -> None:
    """As ``single_tensor.step``, or as ``variants.step`` by its damped rule where ``rule`` is not "paper".

    All tensors are of one pair of dtypes, and ``applies`` holds. State in bfloat16 needs ``keys``: this path
    has no rounding to nearest for it.
    """
    if not params:
        return
    library = _library()
    assert not isinstance(library, str), library
    dtype, kept = params[0].dtype, exp_avgs[0].dtype
    loop = _LOOPS[dtype, kept, stochastic and dtype == _BF16]
    assert keys is not None or (kept != _BF16 and not stochastic), "stochastic rounding needs keys"
    rate, of_gradient = float(lr), beta1 - 1 if maximize else 1 - beta1
    ahead = 0.0 if rule == "paper" else of_gradient
    settings = _Settings(
        beta1, of_gradient, rate * scale, 1 - rate * weight_decay, gamma, eps, ahead, damping
    )
    least = None if rule == "paper" else _floors(loop, grads, exp_avgs, settings)
    lengths = array("q", [p.numel() for p in params])
    noise = None if keys is None else array("Q", keys)
    # Addresses are taken anew each step: gradients move when they are set to None.
    table = [array("q", [t.data_ptr() for t in column]) for column in (params, grads, exp_avgs, hessians)]
    total = sum(lengths)

    def part(begin: int, end: int) -> None:
        library.sophia_step(
            loop,
            len(lengths),
            lengths.buffer_info()[0],
            *(column.buffer_info()[0] for column in table),
            None if noise is None else noise.buffer_info()[0],
            None if least is None else least.buffer_info()[0],
            begin,
            end,
            ctypes.addressof(settings),
        )

    _in_parts(part, total)
    # The C loop is invisible to autograd: tell it that these have changed, as an in-place operation would.
    torch.autograd.graph.increment_version([*params, *exp_avgs])


def _floors(
    loop: int, grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], settings: _Settings
) -> array[float]:
    """The floors of the damped rule, a tensor; -1 for a small one, which the library walks through twice."""
    library = _library()
    assert not isinstance(library, str), library
    floors = array("d", [-1.0]) * len(grads)
    large = [t for t, g in enumerate(grads) if g.numel() > _SMALL]
    for sampled in (False, True) if large else ():
        every = EVERY if sampled else 1
        piece = LINE * every * 2**12  # elements
        chosen = [t for t in large if (grads[t].numel() > SAMPLED_ABOVE) == sampled]
        pieces = [(t, begin) for t in chosen for begin in range(0, grads[t].numel(), piece)]
        lengths = array("q", [min(piece, grads[t].numel() - begin) for t, begin in pieces])
        table = [
            array("q", [column[t].data_ptr() + begin * column[t].element_size() for t, begin in pieces])
            for column in (grads, exp_avgs)
        ]
        sums = array("d", bytes(8 * len(pieces)))

        def part(begin: int, end: int, *, lengths=lengths, table=table, every=every, sums=sums) -> None:  # type: ignore[no-untyped-def]
            addresses = [column.buffer_info()[0] for column in (lengths, *table)]
            where = ctypes.addressof(settings)
            library.sophia_squares(loop, *addresses, every, sums.buffer_info()[0], begin, end, where)

        _in_parts(part, len(pieces), least=1, multiple=1)
        of_tensor = dict.fromkeys(chosen, 0.0)
        for (t, _), found in zip(pieces, sums, strict=True):
            of_tensor[t] += found
        for t, found in of_tensor.items():
            runs = grads[t].numel() // LINE
            looked_at = -(-runs // EVERY) * LINE if sampled else grads[t].numel()
            relative = settings.damping * math.sqrt(found / looked_at)
            floors[t] = settings.eps if relative < settings.eps else relative
    return floors


def averages(hessian: Tensor, diagonal: Tensor | None) -> bool:
    """Whether ``average`` can serve."""
    return (
        hessian.dtype == _BF16
        and hessian.device.type == "cpu"
        and type(hessian) is Tensor
        and unavailable() is None
        and is_dense(hessian)
        and (
            diagonal is None
            or (
                diagonal.dtype == _F32
                and type(diagonal) is Tensor
                and diagonal.device == hessian.device
                and diagonal.stride() == hessian.stride()
            )
        )
    )


def average(hessian: Tensor, diagonal: Tensor | None, *, beta2: float, key: int) -> None:
    """As ``curvature.average``, for h in bfloat16 where ``averages`` holds."""
    library = _library()
    assert not isinstance(library, str), library
    h, d = hessian.data_ptr(), 0 if diagonal is None else diagonal.data_ptr()

    def part(begin: int, end: int) -> None:
        where = d + 4 * begin if d else None
        library.sophia_average(h + 2 * begin, where, end - begin, moved(key, begin), beta2, 1 - beta2)

    _in_parts(part, hessian.numel())
    torch.autograd.graph.increment_version([hessian])


def _in_parts(
    part: Callable[[int, int], None], total: int, *, least: int = _LEAST, multiple: int = 32
) -> None:
    """Call ``part(begin, end)`` for equal parts of [0, total), one a thread; ``least`` is worth a thread."""
    threads = max(1, min(torch.get_num_threads(), total // least))
    # Multiples of a cache line in every dtype, so that no two threads write into one.
    edges = [total * i // threads // multiple * multiple for i in range(threads)] + [total]
    waiting = [_pool().submit(part, *edges[i : i + 2]) for i in range(1, threads)]
    part(*edges[:2])
    for future in waiting:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="sophia")


# A forked child inherits the pool without its threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
