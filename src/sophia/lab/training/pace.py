"""What a step takes on this machine, measured: a real run of eight steps, whose records are thrown away.

The first step is not counted: it fills caches. Of a contender that renews its curvature every
``update_every`` steps the probe does so every second step, so that a few steps show both kinds, and puts the
true period back into the average. A period under another name stays as it is, and is seen only if eight steps
hold it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from sophia.lab.config.run import Run
from sophia.lab.data.tokens import Tokens
from sophia.lab.models import size
from sophia.lab.support.errors import LabError
from sophia.lab.support.signals import Request
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import Record

__all__ = ["STEPS", "Pace", "mean", "measure"]

STEPS = 8
PERIOD = "update_every"
"""The setting that says every how many steps a contender does more than in the others."""


@dataclass(frozen=True)
class Pace:
    """Seconds and bytes of one contender's runs."""

    step: float
    """A step, refreshes included, on average over a period."""
    refreshes: float
    """The part of it that refreshes take."""
    row: float
    """A row of the training log, with what the optimizer says of itself."""
    evaluation: float
    around: float
    """What is before the first step and after the last, once a run."""
    state: int
    """Bytes of a checkpoint: weights and optimizer state."""
    row_bytes: int


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
    size.parameters(config.model)  # imports what building a model needs, once a process
    there = len(tokens.validation) // config.model.context
    planned = max(1, min(config.evaluation.sequences, there))
    sequences = min(planned, 4 * config.batch)  # enough to see what one takes
    settings = dict(config.optimizer.settings)
    period = settings.get(PERIOD, 1)
    if type(period) is int and period > 2:
        settings[PERIOD] = 2
    short = dataclasses.replace(
        config,
        steps=STEPS,
        log_every=1,
        optimizer=dataclasses.replace(config.optimizer, settings=settings),
        evaluation=dataclasses.replace(config.evaluation, every=STEPS - 1, sequences=sequences),
    )
    stamps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="sophia-") as folder:
        began = clock()
        result = train(
            short,
            Path(folder),
            tokens,
            save_every=STEPS + 1,
            stop=stop,
            report=lambda progress: stamps.append(clock()),
        )
        ended = clock()
        record = Record(Path(folder), short)
        totals = [row["seconds"] for row in record.rows() if row["kind"] == "train"]
        row_bytes = (record.folder / "log.jsonl").stat().st_size // (STEPS + 3)
    if result["status"] != "finished":
        raise LabError(
            f"it diverged within {STEPS} steps, so its pace is not known; its runs will hardly do better."
        )
    seconds = [now - before for before, now in pairwise([0.0, *totals])]
    found = _pace(seconds, [began, *stamps, ended], period=period if type(period) is int else 1)
    return dataclasses.replace(
        found,
        evaluation=found.evaluation * planned / sequences,
        state=4 * result["parameters"] + result["state_bytes"],
        row_bytes=row_bytes,
    )


def mean(paces: Sequence[Pace]) -> Pace:
    """Of several measurements of one contender, which ran beside one another."""
    values = {
        field.name: sum(getattr(pace, field.name) for pace in paces) / len(paces)
        for field in dataclasses.fields(Pace)
    }
    return Pace(**{**values, "state": paces[0].state, "row_bytes": paces[0].row_bytes})


def _pace(seconds: Sequence[float], stamps: Sequence[float], *, period: int) -> Pace:
    """From the seconds of each step and the clock before the run, after each step's row, and at the end.

    Between two rows lie a step and the row itself; before the last row lies also an evaluation, one lies
    before the first, and one after the last. Medians, since other programs take the processor now and then.
    """
    even, odd = median(seconds[1::2]), median(seconds[2::2])
    plain, with_refresh = min(even, odd), max(even, odd)
    refreshes = (with_refresh - plain) / period if period > 1 else 0.0
    step = plain + refreshes if period > 1 else median(seconds[1:])
    gaps = [later - sooner for sooner, later in pairwise(stamps)]
    row = max(0.0, median(gap - step for gap, step in zip(gaps[1:-2], seconds[1:-1], strict=True)))
    evaluation = max(0.0, gaps[-2] - seconds[-1] - row)
    around = max(0.0, gaps[0] - seconds[0] - row - evaluation) + max(0.0, gaps[-1] - evaluation)
    return Pace(step, refreshes, row, evaluation, around, state=0, row_bytes=0)
