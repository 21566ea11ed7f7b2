"""Worker processes: several runs at a time, each on cores of its own.

Small models gain little from a second thread and lose much when another program wants the core that it spins
on, so runs share a machine better as processes of one thread. A worker does one run after the other; one that
dies is replaced, and its run goes on from its checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sophia.lab.config.record_format import EndRow
from sophia.lab.config.run import Run
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import LabError, Stopped
from sophia.lab.support.signals import Request, requests
from sophia.lab.training.pace import Pace, measure
from sophia.lab.training.run_folder import Record
from sophia.lab.training.trackers import Trackers

__all__ = ["Crew", "Events", "cores", "execute"]

ATTEMPTS = 3
"""A run whose worker dies so often is given up: it is the run that kills it."""


class Events:
    """Callbacks while runs go on; they do nothing unless overridden."""

    def progress(self, run: Run, step: int, loss: float, unclipped: float | None) -> None:
        """A run got as far as this step."""

    def ended(self, run: Run, result: EndRow) -> None:
        """A run has its result."""

    def died(self, run: Run, attempt: int) -> None:
        """The process of a run died; the run is started again."""

    def failed(self, run: Run, reason: str) -> None:
        """A run cannot be done."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    run: Run | None = field(default=None)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Crew:
    """Processes that do runs, as many at a time as are asked for; they live as long as the block.

    Signals ask every worker to save its state; what is then under way raises ``Stopped``.
    """

    def __init__(
        self, runs: Path, *, workers: int, save_every: int = 100, trackers: Trackers | None = None
    ) -> None:
        self._runs, self._size = runs, workers
        self._with = (runs, save_every, Trackers() if trackers is None else trackers)
        self._members: list[_Worker] = []
        self._told = False
        self._stop = Request()
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> Crew:
        self._stop = self._signals.enter_context(requests(at_once=self._kill))
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for worker in self._members:
                worker.connection.close()  # an idle worker ends at this, a busy one at its next report
            for worker in self._members:
                worker.process.join(timeout=30)
                if worker.process.is_alive():
                    worker.process.kill()
        finally:
            self._signals.close()

    def measure(self, configs: Sequence[Run]) -> list[tuple[Run, Pace | str]]:
        """The pace of runs, by a few steps of each that leave nothing; the reason where that failed."""
        found: list[tuple[Run, Pace | str]] = []
        for run, kind, values in self._done("measure", list(configs)):
            if kind == "measured":
                found.append((run, values[0]))
            elif kind in ("failed", "died"):
                found.append((run, values[0].splitlines()[0]))
        if self._stop:
            raise Stopped("Stopped before the first run.", signal=self._stop.signal or 0)
        return found

    def do(self, configs: Sequence[Run], events: Events) -> None:
        """Do all runs that have no result, in order. Their data must be in the cache of tokens.

        Raises ``LabError`` at the end if runs failed, after the others are done.
        """
        todo = [config for config in configs if Record(self._runs, config).result() is None]
        attempts: collections.Counter[str] = collections.Counter()
        failures: list[str] = []

        def fail(run: Run, reason: str) -> None:
            Record(self._runs, run).attempt(failed=reason)
            what, *trace = reason.splitlines()  # the whole of it stands in the record
            where = f" (all of it: {run.hash}/attempts.jsonl)" if trace else ""
            failures.append(f"{run.optimizer.contender}, {run.steps} steps, seed {run.seed}: {what}{where}")
            events.failed(run, reason)

        for run, kind, values in self._done("run", todo):
            if kind == "progress":
                events.progress(run, *values)
            elif kind == "ended":
                events.ended(run, *values)
            elif kind == "failed":
                fail(run, values[0])
            elif kind == "died" and not self._stop:
                attempts[run.hash] += 1
                if attempts[run.hash] < ATTEMPTS:
                    events.died(run, attempts[run.hash])
                    todo.insert(0, run)
                else:
                    fail(run, values[0])
        if self._stop:
            raise Stopped("Stopped; every run under way has saved its state.", signal=self._stop.signal or 0)
        if failures:
            raise LabError("Some runs failed; the others are done.\n" + "\n".join(failures))

    def _done(self, task: str, todo: list[Run]) -> Iterator[tuple[Run, str, list[Any]]]:
        """Hand out runs until there is none, and give what comes back; whoever listens may add to them."""
        while todo or any(w.run for w in self._members):
            if self._stop and not self._told:
                self._told = True
                todo.clear()
                for worker in self._members:
                    worker.process.terminate()  # it finishes its step and saves
            while todo and (idle := self._idle()):
                idle.run = todo.pop(0)
                idle.connection.send((task, to_json(idle.run)))
            for ready in wait([w.connection for w in self._members if w.run], timeout=0.2):
                worker = next(w for w in self._members if w.connection is ready)
                run = worker.run
                assert run is not None, "only workers with a run were waited for"
                try:
                    kind, *values = worker.connection.recv()
                except (EOFError, OSError):
                    self._members.remove(worker)
                    yield run, "died", ["its process died, perhaps for lack of memory"]
                    continue
                if kind != "progress":
                    worker.run = None
                yield run, kind, values

    def _idle(self) -> _Worker | None:
        for worker in self._members:
            if worker.run is None and worker.process.is_alive():
                return worker
        self._members[:] = [w for w in self._members if w.run is not None]
        if len(self._members) >= self._size:
            return None
        context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads may hang
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *self._with), daemon=True)
        before = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited: Ctrl-C reaches the whole group, we pass it on
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        self._members.append(_Worker(process, ours))
        return self._members[-1]

    def _kill(self) -> None:
        for worker in self._members:
            worker.process.kill()


def execute(
    configs: Sequence[Run],
    runs: Path,
    *,
    workers: int,
    events: Events,
    save_every: int = 100,
    trackers: Trackers | None = None,
) -> None:
    """Do all runs with a crew of their own; see `Crew.do`."""
    with Crew(runs, workers=workers, save_every=save_every, trackers=trackers) as crew:
        crew.do(configs, events)


def _work(connection: Connection, runs: Path, save_every: int, trackers: Trackers) -> None:
    """Main function of a worker: receive a run, do it or measure its pace, report how that ended, until the
    connection closes.
    """
    from sophia.lab.data.tokens import open_cached
    from sophia.lab.training.loop import Progress, train

    _keep_memory()
    # Ctrl-C reaches the whole group, and then the parent asks again: those would be two requests.
    with requests(numbers=(signal.SIGTERM,)) as stop:

        def send(*message: Any) -> None:
            try:
                connection.send(message)
            except OSError:  # whoever asked for the run is gone: save and end
                stop.signal = stop.signal or signal.SIGTERM

        def report(progress: Progress) -> None:
            send("progress", progress.step, progress.loss, progress.unclipped)

        while not stop:
            try:
                task, planned = connection.recv()
                run = from_json(Run, planned)
            except (EOFError, OSError):
                return
            try:
                tokens = open_cached(run.data.text)
                if tokens is None:
                    raise LabError("the encoded text is gone from the cache; give the same command again")
                if task == "measure":
                    send("measured", measure(run, tokens, stop=stop))
                    continue
                result = train(
                    run,
                    runs,
                    tokens,
                    save_every=save_every,
                    stop=stop,
                    report=report,
                    trackers=trackers,
                )
                send("ended", result)
            except Stopped:
                send("stopped")
            except LabError as error:
                send("failed", str(error))
            except Exception as error:
                short = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                send(
                    "failed",
                    short if isinstance(error, MemoryError) else f"{short}\n{traceback.format_exc()}",
                )


def _keep_memory() -> None:
    """Tell glibc to keep freed blocks, such as logits, for the next step.

    It would give each back to the system and have it cleared again, a tenth of the time of a small model's
    step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        library = ctypes.CDLL(None)
        for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(threshold, 1 << 30)
