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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sophia.step.flat_views import is_dense
from sophia.step.kernels import foreach
from sophia.step.rounding import moved
from sophia.step.rules import DAMPED, PAPER, StepSettings

__all__ = [
    "IMPLEMENTED",
    "applies",
    "average",
    "averages",
    "in_parts",
    "library",
    "step",
    "threads_for",
    "unavailable",
]

IMPLEMENTED = (PAPER, DAMPED)
"""Rules that this path knows."""

_VERSION = 5  # of the interface, as in fused_cpu.c
_LEAST = 2**15  # elements that are worth a thread of their own
_PIECE = 2**14  # elements that one thread does at a time, as in fused_cpu.c

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


class _Numbers(ctypes.Structure):
    """The numbers of a step, as the library has them."""

    _fields_ = tuple(
        (name, ctypes.c_double)
        for name in ("beta1", "gradient", "lr", "decay", "gamma", "eps", "ahead", "damping", "started")
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
    library.sophia_step.argtypes = [ctypes.c_int32, count, *[pointer] * 8, *[count] * 2, pointer]
    library.sophia_step.restype = None
    library.sophia_floors.argtypes = [ctypes.c_int32, count, *[pointer] * 6]
    library.sophia_floors.restype = None
    library.sophia_sizes.argtypes = [ctypes.c_int32, count, *[pointer] * 4]
    library.sophia_sizes.restype = None
    library.sophia_average.argtypes = [pointer, pointer, count, key, number, number]
    library.sophia_average.restype = None
    matrix, coefficients = [count] * 3, [number] * 2
    library.sophia_matrix_squares.argtypes = [pointer, pointer, *matrix, *coefficients, pointer, pointer]
    library.sophia_matrix_scaled.argtypes = [*[pointer] * 3, *matrix, *coefficients, number, pointer, pointer]
    library.sophia_matrix_norms.argtypes = [pointer, *matrix, *[pointer] * 3]
    library.sophia_matrix_move.argtypes = [pointer, pointer, *matrix, number, pointer, pointer]
    for name in ("squares", "scaled", "norms", "move"):
        getattr(library, f"sophia_matrix_{name}").restype = None
    return library


def library() -> ctypes.CDLL:
    """The compiled loops, where `unavailable` says nothing."""
    loaded = _library()
    assert not isinstance(loaded, str), loaded
    return loaded


def unavailable() -> str | None:
    """Why this path cannot run here, or None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four can be walked through as flat memory of a CPU, in dtypes that the library has."""
    # is_cpu takes a sixth of the time of device.type, for every tensor at every step.
    return (
        param.is_cpu
        and grad.is_cpu
        and exp_avg.is_cpu
        and hessian.is_cpu
        and (param.dtype, exp_avg.dtype, False) in _LOOPS
        and foreach.in_step(param, grad, exp_avg, hessian)
    )


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
    """As ``single_tensor.step``, for the rules of ``IMPLEMENTED``.

    All tensors are of one pair of dtypes, and ``applies`` holds. State in bfloat16 needs ``keys``: this path
    has no rounding to nearest for it.
    """
    if not params:
        return
    loops = library()
    dtype, kept = params[0].dtype, exp_avgs[0].dtype
    s = settings
    loop = _LOOPS[dtype, kept, s.stochastic and dtype == _BF16]
    assert keys is not None or (kept != _BF16 and not s.stochastic), "stochastic rounding needs keys"
    rate, of_gradient = float(s.lr), s.beta1 - 1 if s.maximize else 1 - s.beta1
    numbers = _Numbers(
        s.beta1,
        of_gradient,
        rate * s.scale,
        1 - rate * s.weight_decay,
        s.gamma,
        s.eps,
        of_gradient if s.rule.looks_ahead else 0.0,
        s.damping,
        s.started,
    )
    where = ctypes.addressof(numbers)
    lengths = array("q", [p.numel() for p in params])
    # Addresses are taken anew each step: gradients move when they are set to None.
    table = [_addresses(column) for column in (params, grads, exp_avgs, hessians)]
    total, count = sum(lengths), len(lengths)
    length, (p, g, m, h) = _start(lengths), map(_start, table)
    noise = None if keys is None else array("Q", keys)
    floors, sums, size = None, None, None
    if sizes is not None:
        size, floors = _addresses(sizes), array("d", bytes(8 * count))
        sums = array("d", bytes(8 * (total // _PIECE + count)))  # at most so many pieces
        loops.sophia_floors(loop, count, length, g, m, _start(size), _start(floors), where)

    def part(begin: int, end: int) -> None:
        loops.sophia_step(
            loop, count, length, p, g, m, h, _start(noise), _start(floors), _start(sums), begin, end, where
        )

    _in_parts(part, total)
    if size is not None:
        loops.sophia_sizes(loop, count, length, _start(size), _start(sums), where)
    # The C loop is invisible to autograd: tell it that these have changed, as an in-place operation would.
    torch.autograd.graph.increment_version([*params, *exp_avgs])


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("q", [t.data_ptr() for t in tensors])


def _start(numbers: array[Any] | None) -> int | None:
    """Where an array begins in memory, or NULL."""
    return None if numbers is None else numbers.buffer_info()[0]


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
    loops = library()
    h, d = hessian.data_ptr(), 0 if diagonal is None else diagonal.data_ptr()

    def part(begin: int, end: int) -> None:
        where = d + 4 * begin if d else None
        loops.sophia_average(h + 2 * begin, where, end - begin, moved(key, begin), beta2, 1 - beta2)

    _in_parts(part, hessian.numel())
    torch.autograd.graph.increment_version([hessian])


def _in_parts(part: Callable[[int, int], None], total: int) -> None:
    # Multiples of a cache line in every dtype, so that no two threads write into one.
    in_parts(lambda number, *edges: part(*edges), total, threads_for(total), multiple=32)


def threads_for(elements: int) -> int:
    """Threads that so many elements are worth."""
    return max(1, min(torch.get_num_threads(), elements // _LEAST))


def in_parts(part: Callable[[int, int, int], None], total: int, threads: int, *, multiple: int = 1) -> None:
    """Call ``part(number, begin, end)`` for equal parts of [0, total), one a thread."""
    edges = [total * i // threads // multiple * multiple for i in range(threads)] + [total]
    waiting = [_pool().submit(part, i, *edges[i : i + 2]) for i in range(1, threads)]
    part(0, *edges[:2])
    for future in waiting:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="sophia")


# A forked child inherits the pool without its threads, and would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
