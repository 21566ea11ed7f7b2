"""Options of `sophia experiment`; the experiments are in ``sophia.lab.experiments``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from rich.console import Console

    from sophia.lab.experiments.framework.definition import Experiment as Described

__all__ = ["Experiment"]


@dataclass(frozen=True)
class Experiment:
    """Put claims of the paper to the test: run, draw, and say what was shown.

    Without a name it lists the experiments. A run that was stopped goes on where it was; one that is finished
    is only drawn again.
    """

    names: Positional[tuple[str, ...]] = ()
    """Names of experiments, or "all"."""
    quick: bool = False
    """A run of seconds that exercises every path; its numbers mean nothing, and its records lie apart."""
    redraw: bool = False
    """Run nothing: the picture and the verdict again, from the records."""
    out: Path = Path("results/experiments")
    """Folder of the records; each experiment has its own in it."""

    def run(self, command: str) -> int:
        """Do it for each name."""
        from rich.console import Console

        from sophia.lab import experiments

        console = Console()
        if not self.names:
            _list(console, self.out)
            return 0
        names = experiments.NAMES if self.names == ("all",) else self.names
        for experiment in [experiments.find(name) for name in names]:  # misspelt names stop it here
            self._one(console, experiment, command)
        return 0

    def _one(self, console: Console, experiment: Described, command: str) -> None:
        from rich.markup import escape

        from sophia.lab.experiments.framework import older_numerics, runner
        from sophia.lab.experiments.framework.progress import Bar
        from sophia.lab.experiments.framework.records import Records
        from sophia.lab.support.errors import Stopped
        from sophia.lab.support.signals import requests

        console.print(f"[bold]{experiment.name}[/bold]: {experiment.title}", highlight=False)
        if self.redraw:
            records = Records(runner.folder_of(experiment.name, self.out, quick=self.quick))
        else:
            console.print(
                f"Takes: {escape(experiment.runtime)}; less than a megabyte of records.\n"
                f"Expected: {experiment.expected}",
                highlight=False,
            )
            with requests() as stop, Bar(console, experiment.name, stop) as bar:
                try:
                    records = runner.run(experiment, self.out, bar, quick=self.quick)
                except Stopped as stopped:
                    raise Stopped(
                        f"{stopped} It goes on where it was: {command}", signal=stopped.signal
                    ) from None
        picture = runner.draw(experiment, records)
        if not records.finished:
            console.print("Not finished: no verdict yet.", highlight=False)
        else:
            verdict = experiment.verdict(records)
            word = f"{verdict.word} (quick: means nothing)" if self.quick else verdict.word
            console.print(f"Verdict: [bold]{word}[/bold]. {verdict.sentence}", highlight=False)
        if said := older_numerics.notice(experiment, records):
            console.print(said, highlight=False, markup=False)
        console.print(f"Records: {records.folder}   Picture: {picture}", highlight=False, soft_wrap=True)


def _list(console: Console, out: Path) -> None:
    from rich.table import Table

    from sophia.lab import experiments
    from sophia.lab.experiments.framework import runner
    from sophia.lab.experiments.framework.records import Records

    table = Table(box=None, pad_edge=False)
    for title in ("name", "what", "takes", "records here"):
        table.add_column(title)
    for experiment in experiments.every():
        records = Records(runner.folder_of(experiment.name, out))
        state = "finished" if records.finished else f"{len(records.rows)} rows" if records.rows else "none"
        table.add_row(experiment.name, experiment.title, experiment.runtime, state)
    console.print(table)
