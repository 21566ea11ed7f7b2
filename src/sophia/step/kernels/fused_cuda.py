"""The published rule in one launch over all tensors of a GPU, by a Triton kernel that reads a table of
addresses.

Six words a coordinate move where the foreach path moves fourteen. Nothing waits for the device, and a tensor
lr is read there, so a step can be captured in a CUDA graph. It is taken with ``fused=True`` alone: the kernel
is held to the rule by Triton's interpreter, which shows arithmetic, masks and types but no speed; so that a
real device need not be trusted blindly, its first use there steps one small list by both paths, and where
they differ, or Triton does not run, the foreach path serves and a warning says why.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sophia.checks import SophiaWarning
from sophia.step.kernels import foreach
from sophia.step.rules import PAPER, StepSettings

__all__ = ["IMPLEMENTED", "applies", "step", "unavailable"]

IMPLEMENTED = (PAPER,)
"""Rules that this path knows."""

_BLOCK = 1024
_PARAMS = (torch.float32, torch.bfloat16, torch.float16)
# Tables of captured graphs: the graph reads them whenever it is replayed.
_captured: list[tuple[Tensor, ...]] = []
_last: dict[torch.device, tuple[list[int], Tensor]] = {}


def applies(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether these four can be walked through as flat memory of one GPU, with float32 state."""
    return (
        param.device.type == "cuda"
        and param.dtype in _PARAMS
        and exp_avg.dtype == torch.float32
        and foreach.applies(param, grad, exp_avg, hessian)
    )


def unavailable(device: torch.device) -> str | None:
    """Why this path cannot run on ``device``, or None if it can. The first call steps a small list there."""
    if device not in _answers:
        if torch.cuda.is_current_stream_capturing():
            return "a graph is being captured before any step was taken"  # warm up first, as torch asks
        _answers[device] = reason = _try_out(device)
        if reason is not None:
            warnings.warn(
                f"Sophia(fused=True): the Triton kernel is not used on {device}, because {reason}. The "
                "foreach path serves; pass fused=None to mean it",
                SophiaWarning,
            )
    return _answers[device]


_answers: dict[torch.device, str | None] = {}


def _try_out(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    made = torch.Generator().manual_seed(0)
    columns = [[torch.randn(n, generator=made).to(device) for n in (3, 2 * _BLOCK + 1)] for _ in range(4)]
    columns[3] = [h.pow(3) for h in columns[3]]
    settings = StepSettings(PAPER, lr=0.01, beta1=0.9, gamma=0.05, eps=1e-12, weight_decay=0.1)
    results = []
    for kernel in (foreach.step, step):
        params, grads, exp_avgs, hessians = ([t.clone() for t in column] for column in columns)
        try:
            kernel(params, grads, exp_avgs, hessians, settings)
        except Exception as error:  # whatever a compiler or driver throws, training must go on
            return f"it failed ({type(error).__name__}: {error})"
        results.append(torch.cat([*params, *exp_avgs]))
    gap = float((results[0] - results[1]).abs().max())
    return None if gap < 1e-5 else f"its numbers are off by {gap:.1e}"


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
    """As ``single_tensor.step``; all tensors of one device such that ``applies`` holds, and a tensor lr there
    too. It rounds to nearest alone: with ``stochastic`` the foreach path is taken.
    """
    if settings.stochastic:
        foreach.step(params, grads, exp_avgs, hessians, settings, keys=keys)
        return
    s = settings
    rows: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for row in zip(params, grads, exp_avgs, hessians, strict=True):
        if row[0].numel():
            rows.setdefault((row[0].dtype, row[1].dtype), []).append(row)
    kernel, types = _kernel()
    for (param, grad), columns in rows.items():
        device = columns[0][0].device
        addresses = [t.data_ptr() for column in zip(*columns, strict=True) for t in column]
        counts = [row[0].numel() for row in columns]
        blocks = [-(-count // _BLOCK) for count in counts]
        firsts = [0, *accumulate(blocks)][:-1]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(sum(blocks),)](
                _table([*addresses, *counts, *firsts], device),
                len(columns),
                s.lr,
                0.0 if isinstance(s.lr, Tensor) else 1 - s.lr * s.weight_decay,
                1 - s.beta1,
                s.gamma,
                s.eps,
                s.weight_decay,
                PARAM=types[param],
                GRAD=types[grad],
                LR_IS_ADDRESS=isinstance(s.lr, Tensor),
                MAXIMIZE=s.maximize,
                HALVINGS=len(columns).bit_length(),
                ALIGNED=all(address % 16 == 0 for address in addresses),
                BLOCK=_BLOCK,
            )
    # The kernel is invisible to autograd: tell it that these have changed, as an in-place operation would.
    torch.autograd.graph.increment_version([*params, *exp_avgs])


def _table(entries: list[int], device: torch.device) -> Tensor:
    """The table on the device; the last one if nothing moved, which is most steps."""
    known = _last.get(device)
    if known is not None and known[0] == entries:
        if torch.cuda.is_current_stream_capturing():
            _captured.append((known[1],))  # the next other table would free it under the graph
        return known[1]
    host = torch.tensor(entries, dtype=torch.int64)
    if device.type != "cuda":
        return host  # the interpreter
    host = host.pin_memory()  # a copy from pageable memory would wait, and cannot be captured
    table = host.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append((host, table))
    else:
        _last[device] = (entries, table)
    return table


@cache
def _kernel() -> tuple[Any, dict[torch.dtype, Any]]:
    import triton.language as tl

    from sophia.step.kernels.triton_step import sophia_step

    return sophia_step, {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
