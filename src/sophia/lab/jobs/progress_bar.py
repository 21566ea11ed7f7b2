"""Progress display of a comparison: one bar for all runs, and a line for each contender."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from sophia.lab.config.record_format import EndRow
from sophia.lab.config.run import Run
from sophia.lab.support.units import duration
from sophia.lab.training.workers import Events

__all__ = ["Display"]


class Display(Events):
    """A live view on a terminal; on anything else a line for each run that ends."""

    def __init__(self, console: Console, runs: Sequence[Run], done: Sequence[str]) -> None:
        """``done`` holds the hashes of the runs that had ended before."""
        self._console = console
        self._total = sum(run.steps for run in runs)
        self._steps = {run.hash: run.steps if run.hash in done else 0 for run in runs}
        self._planned: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        for run in runs:
            name = run.optimizer.contender
            self._planned[name] = self._planned.get(name, 0) + 1
            self._ended[name] = self._ended.get(name, 0) + (run.hash in done)
        self._now: dict[str, tuple[Run, float, float | None]] = {}
        self._began: float | None = None
        self._began_at = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.percentage:>3.0f}%"),
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=self._total, completed=self._done)
        self._live = Live(get_renderable=self._view, console=console, refresh_per_second=2, transient=True)

    @property
    def _done(self) -> int:
        return sum(self._steps.values())

    def __enter__(self) -> Display:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def progress(self, run: Run, step: int, loss: float, unclipped: float | None) -> None:
        """Remember how far it is, and estimate the time left from the pace so far."""
        self._steps[run.hash] = step
        done = self._done
        if self._began is None:  # the start of the workers would make the pace look slower than it is
            self._began, self._began_at = time.monotonic(), done
        self._now[run.optimizer.contender] = (run, loss, unclipped)
        left = "estimating the time left"
        if done > self._began_at:
            seconds = (self._total - done) * (time.monotonic() - self._began) / (done - self._began_at)
            left = f"{duration(seconds)} left"
        self._bar.update(self._task, completed=done, description=left)

    def ended(self, run: Run, result: EndRow) -> None:
        """Say in a line how a run ended; these lines stay."""
        self._steps[run.hash] = run.steps
        name = run.optimizer.contender
        self._ended[name] += 1
        self._bar.update(self._task, completed=self._done)
        if result["status"] == "finished":
            loss, bits = result["loss"], result["bits_per_byte"]
            how = f"loss {loss:.4f}, {bits:.4f} bits per byte, {result['seconds']:.0f} s"
        else:
            how = f"[red]diverged after {result['steps']} steps[/red]"
        self._console.print(f"{name}, {run.steps} steps, seed {run.seed}: {how}", highlight=False)

    def died(self, run: Run, attempt: int) -> None:
        """Say that a run begins again from its checkpoint."""
        self._console.print(
            f"{run.optimizer.contender}, seed {run.seed}: its process died (attempt {attempt}); it goes on."
        )

    def failed(self, run: Run, reason: str) -> None:
        """Say which run failed; the reasons come at the end."""
        self._console.print(
            f"[red]{run.optimizer.contender}, {run.steps} steps, seed {run.seed}: failed[/red]"
        )

    def _view(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for title in ("contender", "runs done", "now", "loss", "unclipped"):
            table.add_column(title, justify="right" if title in ("loss", "unclipped") else "left")
        for name, planned in self._planned.items():
            run, loss, unclipped = self._now.get(name, (None, None, None))
            table.add_row(
                name,
                f"{self._ended[name]} of {planned}",
                f"seed {run.seed}, step {self._steps[run.hash]} of {run.steps}" if run else "",
                f"{loss:.3f}" if loss is not None else "",
                f"{unclipped:.1%}" if unclipped is not None else "",
            )
        return Group(self._bar, table)
