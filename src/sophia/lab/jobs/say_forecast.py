"""Forecast that `compare`, `sweep` and `train` print before they begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from sophia.lab.config.run import Run
from sophia.lab.forecast import comparison
from sophia.lab.forecast.comparison import Remaining
from sophia.lab.training.pace import Pace

__all__ = ["say_forecast"]


def say_forecast(
    rounds: Sequence[Sequence[Remaining]],
    measure: Callable[[Sequence[Run]], list[tuple[Run, Pace | str]]],
    *,
    records: Path,
    runs: int,
    workers: int,
    report: bool,
    ended: str,
    console: Console,
) -> None:
    """Measure a few steps of each contender, and print what the runs that are left will take.

    Args:
        rounds: what is left; see `comparison.forecast`.
        measure: gives the pace of runs, or the reason why there is none.
        records: folder of the runs.
        runs: how many the command has in all.
        workers: runs at a time.
        report: whether a page and pictures come at the end.
        ended: what to print where nothing is left.
        console: where to print.
    """
    left = [each.run for round_ in rounds for each in round_]
    if not left:
        console.print(ended, highlight=False)
        return
    with console.status("measuring a few steps of each contender"):
        measured = comparison.paces(measure(comparison.probes(left, workers)))
    foreseen = comparison.forecast(
        rounds, measured, records=records, runs=runs, workers=workers, report=report
    )
    console.print(foreseen.sentence, highlight=False)
