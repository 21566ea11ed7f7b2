"""Forecast of a run of `sophia pretrain`: disk and memory from shapes before the first step, time from its
own first steps. A probe in a folder of its own, as for small runs, would build a large model twice.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from sophia.lab.config.run import Run
from sophia.lab.models.size import forecast
from sophia.lab.support.files import existing
from sophia.lab.support.units import duration, size, small_duration

__all__ = ["Pacer", "disk", "needs"]


def needs(run: Run, out: Path, *, devices: int, sharded: bool, recompute: bool, save_every: int) -> str:
    """Disk and memory, in a sentence.

    Args:
        run: the run.
        out: folder of its records.
        devices: processes that share it.
        sharded: whether they share weights and state too.
        recompute: whether activations are computed twice and not kept.
        save_every: steps between two checkpoints.
    """
    whole = forecast(run, devices=devices, sharded=sharded, recompute=recompute)
    added, free = disk(run, save_every), shutil.disk_usage(existing(out)).free
    short = " That is more than there is." if added > free else ""
    return (
        f"Forecast: {whole.flops:.2e} FLOPs; about {size(whole.peak)} of memory a process; disk: about "
        f"{size(added)}, {size(free)} are free.{short} Time follows after the first steps."
    )


def disk(run: Run, save_every: int) -> int:
    """Bytes of its checkpoints, nearly all that it leaves: the last two are kept, and the end is one."""
    whole = forecast(run)
    saved = whole.weights - 4 * whole.parameters  # gradients are not saved
    return saved * (2 if run.steps > save_every else 1)


class Pacer:
    """Time of the rest, from the steps between the first two rows of this start: what is before the first
    row fills caches, compiles, and says nothing of later steps.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._rows: list[tuple[int, float]] = []

    def row(self, step: int) -> str | None:
        """A row of the log was written at this step; a sentence at the second one."""
        if len(self._rows) == 2 or step >= self._run.steps:
            return None
        self._rows.append((step, self._clock()))
        if len(self._rows) == 1:
            return None
        (first, began), (_, now) = self._rows
        pace, left = (now - began) / (step - first), self._run.steps - step
        return (
            f"Forecast: about {duration(pace * left)} for the other {left:,} steps, checkpoints not counted; "
            f"{small_duration(pace)} a step, measured over steps {first + 1} to {step}."
        )
