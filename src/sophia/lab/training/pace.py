"""Pace of a contender on this machine: seconds of a step, measured in a real run whose records are deleted.

The first step is not counted: it fills caches. The mean of the ten steps after it holds every curvature
refresh whose period divides ten; what comes less often than every tenth step is missed.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from sophia.lab.config.run import Run
from sophia.lab.data.tokens import Tokens
from sophia.lab.models import size
from sophia.lab.optimizers import table
from sophia.lab.support.errors import LabError
from sophia.lab.support.signals import Request
from sophia.lab.training.fingerprint import fingerprint
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import Record

__all__ = ["STEPS", "Pace", "mean", "measure"]

STEPS = 11


@dataclass(frozen=True)
class Pace:
    """Seconds and bytes of one contender's runs."""

    step: float
    """A step, refreshes included, on average."""
    evaluation: float
    around: float
    """What is before the first step and after the last, once a run; evaluations are not in it."""
    state: int
    """Bytes of a checkpoint: weights and optimizer state."""


def measure(
    config: Run,
    tokens: Tokens,
    *,
    stop: Request | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Pace:
    """Train for `STEPS` steps in a temporary folder, and read the pace off.

    Raises ``LabError`` if the contender diverges that early, and what `train` raises.
    """
    # Once a process: imports of what a model needs, and the fingerprint that every result has.
    size.parameters(config.model)
    fingerprint(table.of(config.optimizer), config.device)
    there = len(tokens.validation) // config.model.context
    planned = max(1, min(config.evaluation.sequences, there))
    sequences = min(planned, 4 * config.batch)  # enough to see what one takes
    short = dataclasses.replace(
        config,
        steps=STEPS,
        log_every=1,
        evaluation=dataclasses.replace(config.evaluation, every=STEPS - 1, sequences=sequences),
    )
    stamps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="sophia-") as folder:
        stamps.append(clock())
        result = train(
            short,
            Path(folder),
            tokens,
            save_every=STEPS + 1,
            stop=stop,
            report=lambda progress: stamps.append(clock()),
        )
        stamps.append(clock())
        totals = [row["seconds"] for row in Record(Path(folder), short).rows() if row["kind"] == "train"]
    if result["status"] != "finished":
        raise LabError(
            f"it diverged within {STEPS} steps, so its pace is not known; its runs will hardly do better."
        )
    # An evaluation lies before the first step, one between the last two rows, and one after the last.
    gaps = [later - sooner for sooner, later in pairwise(stamps)]
    evaluation = max(0.0, gaps[-2] - (totals[-1] - totals[-2]))
    around = max(0.0, gaps[0] - totals[0] - evaluation) + max(0.0, gaps[-1] - evaluation)
    return Pace(
        step=(totals[-1] - totals[0]) / (STEPS - 1),
        evaluation=evaluation * planned / sequences,
        around=around,
        state=4 * result["parameters"] + result["state_bytes"],
    )


def mean(paces: Sequence[Pace]) -> Pace:
    """Mean of several measurements of one contender, made side by side."""
    return Pace(
        step=fmean(pace.step for pace in paces),
        evaluation=fmean(pace.evaluation for pace in paces),
        around=fmean(pace.around for pace in paces),
        state=paces[0].state,
    )
