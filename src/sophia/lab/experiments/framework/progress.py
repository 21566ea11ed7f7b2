"""What an experiment tells while it goes on, and how it is asked to stop."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from sophia.lab.support.errors import Stopped
from sophia.lab.support.signals import Request

__all__ = ["Bar", "Progress"]


class Progress:
    """Shows nothing; ``Bar`` shows a bar.

    ``stop`` is true when a signal asked to stop: hand it to ``training.train``, or call ``check()`` in a long
    loop.
    """

    def __init__(self, stop: Request | None = None) -> None:
        self.stop = Request() if stop is None else stop

    def case(self, number: int, of: int, what: str) -> None:
        """The experiment comes to case ``number``, counted from 0; ``number == of`` means it is done."""

    def within(self, fraction: float, what: str = "") -> None:
        """So much of the present case is done; for cases that take longer than some seconds."""

    def check(self) -> None:
        """Raise ``Stopped`` if a signal asked for it."""
        if self.stop:
            raise Stopped("Stopped; the records so far are on the disk.", signal=self.stop.signal or 0)


class Bar(Progress):
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, console: Console, name: str, stop: Request | None = None) -> None:
        super().__init__(stop)
        self._bar = RichProgress(
            TextColumn(name),
            BarColumn(),
            TextColumn("{task.completed:.1f} of {task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._number, self._what = 0, ""

    def __enter__(self) -> Bar:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def case(self, number: int, of: int, what: str) -> None:
        """Move the bar to the beginning of the case."""
        self._number, self._what = number, what
        self._bar.update(self._task, completed=number, total=of, description=what)

    def within(self, fraction: float, what: str = "") -> None:
        """Move the bar inside the case."""
        said = f"{self._what}: {what}" if what else self._what
        self._bar.update(self._task, completed=self._number + fraction, description=said)
