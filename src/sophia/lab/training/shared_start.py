"""Budgets that share their first part: one trunk, and a branch for each shorter budget.

Under a warm-up-stable-decay schedule two runs that differ in their steps alone are equal, bit for bit, until
the shorter begins to decay. So the longest is trained in full, and where a shorter one would leave it, it
plants that one: the folder of the shorter run gets the log and the checkpoint that it would have there by
itself. From then on it is an ordinary run that was begun and goes on, so it is stopped, resumed and repeated
as any other, and its own costs are those of a run trained alone. Its result says which part was shared
(``trunk``), so that a sum over runs can count that part once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sophia.lab.config import schedules
from sophia.lab.config.run import Run, Schedule
from sophia.lab.support.files import locked
from sophia.lab.training import checkpoint
from sophia.lab.training.run_folder import Record

__all__ = ["Branch", "branches", "plant", "planted", "shared_steps", "steps_to_do"]


@dataclass(frozen=True)
class Branch:
    """A run that leaves another after its first ``at`` steps."""

    run: Run
    at: int


def shared_steps(schedule: Schedule, one: int, other: int) -> int:
    """How many first steps of runs with these budgets have the same learning rate.

    >>> wsd = Schedule(kind="wsd", warmup=5, decay=0.2)
    >>> shared_steps(wsd, 50, 100), shared_steps(Schedule(warmup=5), 50, 100)
    (40, 6)
    """
    for step in range(least := min(one, other)):
        if schedules.factor(schedule, step, steps=one) != schedules.factor(schedule, step, steps=other):
            return step
    return least


def branches(configs: Iterable[Run]) -> dict[str, tuple[Branch, ...]]:
    """For the hash of each trunk, the runs that branch off it.

    Only runs that differ in nothing but their steps, and whose schedule has a stable phase: with a cosine
    hardly more than the warm-up is common.
    """
    alike: list[list[Run]] = []
    for config in configs:
        if config.schedule.kind != "wsd":
            continue
        for group in alike:
            if replace(config, steps=group[0].steps) == group[0]:
                group.append(config)
                break
        else:
            alike.append([config])
    found = {}
    for group in alike:
        trunk = max(group, key=lambda run: run.steps)
        leaving = [
            Branch(run, at)
            for run in sorted(group, key=lambda run: run.steps)
            if run.steps < trunk.steps and (at := shared_steps(run.schedule, run.steps, trunk.steps))
        ]
        if leaving:
            found[trunk.hash] = tuple(leaving)
    return found


def steps_to_do(configs: Sequence[Run]) -> int:
    """Steps of all these runs together, each trunk counted once.

    >>> from sophia.lab.config.run import Data, Optimizer
    >>> wsd = Schedule(kind="wsd", warmup=5, decay=0.2)
    >>> runs = [Run(Data("", "", ""), Optimizer("adamw"), schedule=wsd, steps=n) for n in (50, 100)]
    >>> steps_to_do(runs)
    110
    """
    return sum(run.steps for run in configs) - sum(
        b.at for group in branches(configs).values() for b in group
    )


def planted(runs: Path, config: Run) -> bool:
    """Whether there is a state from which this run can go on."""
    return checkpoint.exists(runs / config.hash)


def plant(branch: Branch, trunk: Record, save: Callable[[Path, int], None]) -> None:
    """Put the log of the trunk, and with ``save(folder, length of the log)`` its state, where the branch
    goes on. What is there already stays: it is the same, or further.
    """
    record = Record(trunk.folder.parent, branch.run)
    if record.result() is not None or planted(trunk.folder.parent, branch.run):
        return
    with locked(record.folder, what="run"):
        record.open()
        trunk.sync()
        shutil.copyfile(trunk.log, record.log)
        save(record.folder, record.sync())  # last: a folder without it is a run that was not begun


def part(trunk: Record, *, steps: int, seconds: float, cpu_seconds: float) -> Mapping[str, Any]:
    """What a branch remembers of the part that it shares."""
    return {"run": trunk.config.hash, "steps": steps, "seconds": seconds, "cpu_seconds": cpu_seconds}
