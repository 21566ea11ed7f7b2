"""All that ``sophia bench`` measures, to one record of plain numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sophia.lab.bench import memory, problem
from sophia.lab.bench.methods import METHODS, REFERENCE, Trainer
from sophia.lab.bench.timing import Clock, amortised, clock_of, steps_alone, training_steps
from sophia.lab.optimizers import contender
from sophia.lab.support import provenance
from sophia.lab.support.errors import LabError, UsageError

__all__ = ["measure"]


def measure(
    what: str,
    *,
    names: Sequence[str] = (),
    threads: int = 1,
    device: str = "cpu",
    rounds: int = 5,
    every: int = 10,
    with_memory: bool = True,
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time every method on ``what`` and return the record; methods that are not installed say so in it.

    Args:
        what: a built-in shape, or ``module:function`` (``subject.make``).
        names: rows of ``METHODS``; all of them by default. The reference is always among them.
        threads: of torch on the CPU.
        device: "cpu" or "cuda".
        rounds: of whole training steps; steps alone get eight times as many.
        every: k, for the amortised cost.
        with_memory: measure peak memory too, in a process for each.
        tell: is given the name of each method when it begins.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise UsageError(f"There is no method {unknown[0]!r}. Choose from: {'; '.join(METHODS)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise LabError("torch sees no GPU here. Leave --device at cpu.")
    torch.set_num_threads(threads)
    chosen = [name for name in METHODS if not names or name in names or name == REFERENCE]
    clock = clock_of(device)
    rows: dict[str, dict[str, Any]] = {}
    reference = METHODS[REFERENCE].make(problem.make(what, device))
    for name in chosen:
        tell(name)
        reason = METHODS[name].missing
        rows[name] = (
            {"missing": reason}
            if reason
            else _row(what, name, reference, threads, device, rounds, every, with_memory, clock)
        )
    first = rows[REFERENCE].get("peak_mib")
    for row in rows.values():
        if first and row.get("peak_mib"):
            row["peak"] = round(row["peak_mib"] / first, 3)
    return {
        "version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "model": what,
        "shape": list(problem.SHAPES[what]) if what in problem.SHAPES else None,
        "parameters": sum(p.numel() for p in reference.parameters),
        "tensors": len(reference.parameters),
        "rounds": rounds,
        "every": every,
        "unit": "time over that of torch's AdamW(fused=True), turn about in one process, medians and "
        "quartiles of rounds; "
        + ("processor seconds" if device == "cpu" else "seconds between idle moments of the device"),
        "environment": provenance.describe(threads=threads, device=device),
        "rows": rows,
    }


def _row(
    what: str,
    name: str,
    reference: Trainer,
    threads: int,
    device: str,
    rounds: int,
    every: int,
    with_memory: bool,
    clock: Clock,
) -> dict[str, Any]:
    method = METHODS[name]
    try:
        own = method.make(problem.make(what, device))
        timed = training_steps(own, reference, rounds=rounds, clock=clock)
        step = steps_alone(own, reference, rounds=8 * rounds, clock=clock)
    except LabError:
        raise
    except Exception as error:  # other people's code on this model: the others are measured all the same
        if name == REFERENCE or name.startswith("sophia"):
            raise
        return {"missing": f"it failed on this model ({type(error).__name__}: {str(error)[:120]})"}
    row: dict[str, Any] = {
        "step": step.to_json(),
        "training_step": timed.plain.to_json(),
        "amortised": round(amortised(timed, every), 5),
        "state_bytes": round(
            contender.state_bytes(own.optimizer) / sum(p.numel() for p in own.parameters), 3
        ),
    }
    if timed.refreshing is not None:
        row["refreshing_step"] = timed.refreshing.to_json()
        row["refresh"] = round(timed.refreshing.median - timed.plain.median, 5)
    if method.version is not None:
        row["package"] = f"{method.package} {method.version}"
    if with_memory:
        peak = memory.peak_bytes(what, name, threads=threads, device=device)
        if peak is not None:
            row["peak_mib"] = round(peak / 2**20, 1)
    return row
