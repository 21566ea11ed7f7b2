"""How long the runs of a command will take and how much disk, from the measured pace of each contender."""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia.lab.config.run import Run
from sophia.lab.support.files import existing
from sophia.lab.support.units import duration, size, small_duration
from sophia.lab.training import checkpoint
from sophia.lab.training import pace as probe
from sophia.lab.training.pace import Pace
from sophia.lab.training.run_folder import Record

__all__ = ["Outlook", "Paces", "Remaining", "makespan", "outlook", "paces", "probes", "remaining"]

REPORT = 600_000
"""Bytes of a comparison's page and pictures, about."""
OVERHEAD = 10_000
"""Bytes of a checkpoint that are no numbers of the model, about; and of a run's small files."""

Paces = Mapping[str, Pace | str]
"""By contender; the reason in words where it could not be measured."""


@dataclass(frozen=True)
class Remaining:
    """What is left of a run."""

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
        return (
            pace.around
            + (self.run.steps - self.step) * pace.step
            + self._times(self.run.log_every) * pace.row
            + (self._times(self.run.evaluation.every) + (self.step == 0)) * pace.evaluation
        )

    def disk(self, pace: Pace, save_every: int) -> int:
        """Bytes that its whole folder will have."""
        checkpoints = min(2, (self.run.steps - 1) // save_every)
        rows = -(-self.run.steps // self.run.log_every) + -(-self.run.steps // self.run.evaluation.every)
        return checkpoints * (pace.state + OVERHEAD) + rows * pace.row_bytes + OVERHEAD

    def _times(self, every: int) -> int:
        """How often something is still done that is done every so many steps, and at the end."""
        steps = self.run.steps
        return steps // every - self.step // every + (steps % every > 0)


@dataclass(frozen=True)
class Outlook:
    """A forecast."""

    runs: int
    """All of the command."""
    ended: int
    """Those of them that have ended before."""
    begun: int
    """Those that go on from a checkpoint."""
    seconds: float
    """Of the runs whose contender was measured."""
    disk: int
    """Bytes that will be added."""
    free: int
    """Bytes free where they go."""
    busy: float | None
    """Programs that wanted a processor in the last minute, if they were far more than there are."""
    paces: Paces

    @property
    def sentence(self) -> str:
        """For people."""
        measured = {name: pace for name, pace in self.paces.items() if isinstance(pace, Pace)}
        failed = {name: pace for name, pace in self.paces.items() if isinstance(pace, str)}
        before = ""
        if self.ended or self.begun:
            verb = "has" if self.ended == 1 else "have"
            before = f"{self.ended} of {self.runs} runs {verb} ended before"
            if self.begun:
                before += f", {self.begun} {'goes' if self.begun == 1 else 'go'} on"
            before += "; "
        missing = "".join(f" Not measured: {name}, {reason}" for name, reason in failed.items())
        if not measured:
            return f"No forecast of the time.{missing}"
        without = f", without {', '.join(failed)}" if failed else ""
        steps = [
            f"{small_duration(pace.step)} with {name}"
            + (f" ({small_duration(pace.refreshes)} of it for refreshes)" if pace.refreshes > 0 else "")
            for name, pace in measured.items()
        ]
        evaluation = max(pace.evaluation for pace in measured.values())
        short = " That is more than there is." if self.disk > self.free else ""
        noise = (
            f" The machine is busy (load {self.busy:.1f}): it may take half the time, or twice."
            if self.busy is not None
            else ""
        )
        return (
            f"Forecast: {before}about {duration(self.seconds)} for the rest{without}. "
            if before
            else f"Forecast: about {duration(self.seconds)}{without}. "
        ) + (
            f"Measured in {probe.STEPS} steps of each: a step takes {', '.join(steps)}; an evaluation "
            f"{small_duration(evaluation)}. Disk: about {size(self.disk)}, {size(self.free)} are free.{short}"
            f"{noise}{missing}"
        )


def probes(runs: Sequence[Run], workers: int) -> list[Run]:
    """The run of each contender whose pace is measured, so often that every worker is busy: alone it would
    look faster than it will be.
    """
    firsts = list({run.optimizer.contender: run for run in reversed(runs)}.values())[::-1]
    whole = -(-len(firsts) // workers) * workers
    return [firsts[i % len(firsts)] for i in range(whole)] if firsts else []


def paces(measured: Sequence[tuple[Run, Pace | str]]) -> Paces:
    """By contender, the means of its measurements; a reason if all of them failed."""
    found: dict[str, Pace | str] = {}
    for name in dict.fromkeys(run.optimizer.contender for run, _ in measured):
        mine = [pace for run, pace in measured if run.optimizer.contender == name]
        good = [pace for pace in mine if isinstance(pace, Pace)]
        found[name] = probe.mean(good) if good else mine[0]
    return found


def remaining(configs: Sequence[Run], runs: Path) -> list[Remaining]:
    """What is left to be done of runs in this folder, in order."""
    todo = [run for run in configs if Record(runs, run).result() is None]
    left = []
    for run in todo:
        record = Record(runs, run)
        if checkpoint.exists(record.folder):
            # The log is at most a few rows ahead of the checkpoint, which is large and is not read for this.
            step = max((row["step"] for row in record.rows()), default=0)
            left.append(Remaining(run, min(step, run.steps), begun=True))
        else:
            left.append(Remaining(run, 0))
    return left


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of some tasks ends: a worker that is free takes the next.

    >>> makespan([3.0, 2.0, 2.0], 2)
    4.0
    """
    free = [0.0] * max(1, workers)
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def outlook(
    rounds: Sequence[Sequence[Remaining]],
    measured: Paces,
    *,
    records: Path,
    runs: int,
    workers: int,
    save_every: int = 100,
    report: bool = True,
) -> Outlook:
    """The forecast of runs that are done round by round; one round unless each waits for the one before.

    Args:
        rounds: what is left.
        measured: paces by contender.
        records: folder of the runs.
        runs: how many runs it has in all.
        workers: runs at a time.
        save_every: steps between two checkpoints.
        report: whether a page and pictures come at the end.
    """
    known = {name: pace for name, pace in measured.items() if isinstance(pace, Pace)}
    left = [each for round_ in rounds for each in round_]
    foreseen = [each for each in left if each.contender in known]
    seconds = sum(
        makespan([each.seconds(known[each.contender]) for each in round_ if each.contender in known], workers)
        for round_ in rounds
    )
    there = sum(_used(Record(records, each.run).folder) for each in foreseen if each.begun)
    disk = sum(each.disk(known[each.contender], save_every) for each in foreseen) - there
    return Outlook(
        runs=runs,
        ended=runs - len(left),
        begun=sum(each.begun for each in left),
        seconds=seconds,
        disk=max(0, disk) + REPORT * report,
        free=shutil.disk_usage(existing(records)).free,
        busy=_busy(),
        paces=measured,
    )


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _busy() -> float | None:
    """The load of the last minute, if it is above one and a half programs a processor: then the pace depends
    on what the others will do.
    """
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    return load if load > 1.5 * (os.cpu_count() or 1) else None
