"""Forecast of time and disk for the runs of a command, from the measured pace of each contender.

    seconds of a run = around + steps * a step + evaluations * an evaluation
    seconds of all   = their sum / workers, and no less than the longest

Rows of the log and checkpoints while they are written are not in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia.lab.config.run import Run
from sophia.lab.support.files import existing
from sophia.lab.support.units import duration, size, small_duration
from sophia.lab.training import checkpoint, pace
from sophia.lab.training.pace import Pace
from sophia.lab.training.run_folder import Record

__all__ = ["Forecast", "Paces", "Remaining", "forecast", "paces", "probes", "remaining"]

REPORT = 600_000
"""Bytes of a comparison's page and pictures, about."""
OVERHEAD = 10_000
"""Bytes of a checkpoint that are no numbers of the model, about; and of a run's small files."""
ROW = 400
"""Bytes of a row of a log, about."""

Paces = Mapping[str, Pace | str]
"""By contender; the reason in words where it could not be measured."""


@dataclass(frozen=True)
class Remaining:
    """Remaining part of a run."""

    run: Run
    step: int
    """Where it goes on, about; 0 if it begins."""
    begun: bool = False
    """Whether it was begun before."""

    @property
    def contender(self) -> str:
        """Whose run it is."""
        return self.run.optimizer.contender

    def seconds(self, pace: Pace) -> float:
        """On one worker."""
        steps, every = self.run.steps, self.run.evaluation.every
        # One at every multiple, one at the end if that is none, and one before the first step.
        evaluations = steps // every - self.step // every + (steps % every > 0) + (self.step == 0)
        return pace.around + (steps - self.step) * pace.step + evaluations * pace.evaluation

    def disk(self, pace: Pace, save_every: int) -> int:
        """Bytes that its whole folder will have."""
        checkpoints = min(2, (self.run.steps - 1) // save_every)
        rows = -(-self.run.steps // self.run.log_every) + -(-self.run.steps // self.run.evaluation.every)
        return checkpoints * (pace.state + OVERHEAD) + rows * ROW + OVERHEAD


@dataclass(frozen=True)
class Forecast:
    """Time and disk of the runs that are left."""

    seconds: float
    """Of the runs whose contender was measured."""
    disk: int
    """Bytes that will be added."""
    sentence: str
    """For people."""


def probes(runs: Sequence[Run], workers: int) -> list[Run]:
    """Runs whose pace is measured: one of each contender, repeated until every worker is busy. Alone it would
    look faster than it will be.
    """
    firsts = list({run.optimizer.contender: run for run in reversed(runs)}.values())[::-1]
    whole = -(-len(firsts) // workers) * workers
    return [firsts[i % len(firsts)] for i in range(whole)] if firsts else []


def paces(measured: Sequence[tuple[Run, Pace | str]]) -> Paces:
    """By contender, the means of its measurements; a reason if all of them failed."""
    found: dict[str, Pace | str] = {}
    for name in dict.fromkeys(run.optimizer.contender for run, _ in measured):
        mine = [seen for run, seen in measured if run.optimizer.contender == name]
        good = [seen for seen in mine if isinstance(seen, Pace)]
        found[name] = pace.mean(good) if good else mine[0]
    return found


def remaining(configs: Sequence[Run], runs: Path) -> list[Remaining]:
    """Remaining parts of the runs in this folder that have no result, in order."""
    left = []
    for run in configs:
        record = Record(runs, run)
        if record.result() is not None:
            continue
        begun = checkpoint.exists(record.folder)
        # The log is at most a few rows ahead of the checkpoint, which is large and is not read for this.
        step = max((row["step"] for row in record.rows()), default=0) if begun else 0
        left.append(Remaining(run, min(step, run.steps), begun))
    return left


def forecast(
    rounds: Sequence[Sequence[Remaining]],
    measured: Paces,
    *,
    records: Path,
    runs: int,
    workers: int,
    save_every: int = 100,
    report: bool = True,
) -> Forecast:
    """The forecast of runs that are done round by round; one round unless each waits for the one before.

    Args:
        rounds: what is left.
        measured: paces by contender.
        records: folder of the runs.
        runs: how many the command has in all.
        workers: runs at a time.
        save_every: steps between two checkpoints.
        report: whether a page and pictures come at the end.
    """
    known = {name: seen for name, seen in measured.items() if isinstance(seen, Pace)}
    seconds, disk = 0.0, REPORT * report
    for round_ in rounds:
        foreseen = [left for left in round_ if left.contender in known]
        each = [left.seconds(known[left.contender]) for left in foreseen]
        seconds += max(sum(each) / workers, max(each, default=0.0))
        disk += sum(left.disk(known[left.contender], save_every) for left in foreseen)
        disk -= sum(_used(Record(records, left.run).folder) for left in foreseen if left.begun)
    begun = [left.begun for round_ in rounds for left in round_]
    before = _before(runs, ended=runs - len(begun), begun=sum(begun))
    disk, free = max(0, disk), shutil.disk_usage(existing(records)).free
    return Forecast(seconds, disk, _sentence(before, seconds, disk, free, measured))


def _before(runs: int, *, ended: int, begun: int) -> str:
    """What was done before, in words; nothing if nothing was."""
    if not (ended or begun):
        return ""
    words = f"{ended} of {runs} runs {'has' if ended == 1 else 'have'} ended before"
    return words + (f", {begun} {'goes' if begun == 1 else 'go'} on" if begun else "")


def _sentence(before: str, seconds: float, disk: int, free: int, measured: Paces) -> str:
    failed = {name: seen for name, seen in measured.items() if isinstance(seen, str)}
    missing = "".join(f" Not measured: {name}, {reason}" for name, reason in failed.items())
    steps = [f"{small_duration(p.step)} with {name}" for name, p in measured.items() if isinstance(p, Pace)]
    if not steps:
        return f"No forecast of the time.{missing}"
    evaluation = max(p.evaluation for p in measured.values() if isinstance(p, Pace))
    rest = f"{before}; about {duration(seconds)} for the rest" if before else f"about {duration(seconds)}"
    without = f", without {', '.join(failed)}" if failed else ""
    short = " That is more than there is." if disk > free else ""
    return (
        f"Forecast: {rest}{without}. Measured in {pace.STEPS} steps of each: "
        f"a step takes {', '.join(steps)}; "
        f"an evaluation {small_duration(evaluation)}. Disk: about {size(disk)}, {size(free)} are free.{short}"
        f"{_busy()}{missing}"
    )


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _busy() -> str:
    """A warning if more than one and a half programs a processor wanted to run in the last minute: then the
    pace depends on what the others will do.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 1.5 * (os.cpu_count() or 1):
        return ""
    return f" The machine is busy (load {load:.1f}): it may take half the time, or twice."
