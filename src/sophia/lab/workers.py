"""Several runs at a time, each on cores of its own.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sophia.lab import trunks
from sophia.lab.config import Run
from sophia.lab.errors import LabError, Stopped
from sophia.lab.record import Record
from sophia.lab.signals import requests
from sophia.lab.strict import from_json, to_json

__all__ = ["Events", "cores", "execute"]

ATTEMPTS = 3
"""A run whose worker dies so often is given up: it is the run that kills it."""


class Events:
    """What one wants to hear of while runs go on; the methods do nothing unless overridden."""

    def progress(self, run: Run, step: int, loss: float, unclipped: float | None) -> None:
        """A run got as far as this step."""

    def ended(self, run: Run, result: dict[str, Any]) -> None:
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(
    configs: Sequence[Run], runs: Path, *, workers: int, events: Events, save_every: int = 100
) -> None:
    """Do all runs, in order, ``workers`` at a time. Their data must be in the cache of tokens.

    A run that shares its first part with a longer one waits until that has passed the place where they part.

    Raises ``Stopped`` if a signal asked for it, after every worker has saved its state; ``LabError`` at the
    end if runs failed, after the others are done.
    """
    todo = collections.deque(config for config in configs if Record(runs, config).result() is None)
    attempts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    crew: list[_Worker] = []
    leaving = trunks.branches(configs)
    trunk_of = {branch.run.hash: trunk for trunk, group in leaving.items() for branch in group}

    def following() -> Run | None:
        pending = {run.hash for run in (*todo, *(w.run for w in crew)) if run is not None}
        for run in todo:
            if trunk_of.get(run.hash) not in pending or trunks.planted(runs, run):
                return run
        return None

    def kill() -> None:
        for worker in crew:
            worker.process.kill()

    with requests(at_once=kill) as stop:
        told = False
        try:
            while todo or any(w.run for w in crew):
                if stop and not told:
                    told = True
                    todo.clear()
                    for worker in crew:
                        worker.process.terminate()  # it finishes its step and saves
                while (chosen := following()) and (idle := _idle(crew, workers, runs, save_every)):
                    todo.remove(chosen)
                    idle.run = chosen
                    group = [(to_json(b.run), b.at) for b in leaving.get(chosen.hash, ())]
                    idle.connection.send((to_json(chosen), group))
                for ready in wait([w.connection for w in crew if w.run], timeout=0.2):
                    worker = next(w for w in crew if w.connection is ready)
                    run = worker.run
                    assert run is not None, "only workers with a run were waited for"
                    try:
                        kind, *values = worker.connection.recv()
                    except (EOFError, OSError):
                        crew.remove(worker)
                        if not stop:
                            attempts[run.hash] += 1
                            if attempts[run.hash] < ATTEMPTS:
                                events.died(run, attempts[run.hash])
                                todo.appendleft(run)
                            else:
                                _fail(
                                    runs,
                                    run,
                                    "its process died, perhaps for lack of memory",
                                    failures,
                                    events,
                                )
                        continue
                    if kind == "progress":
                        events.progress(run, *values)
                        continue
                    worker.run = None
                    if kind == "ended":
                        events.ended(run, *values)
                    elif kind == "failed":
                        _fail(runs, run, values[0], failures, events)
        finally:
            for worker in crew:
                worker.connection.close()  # an idle worker ends at this, a busy one at its next report
            for worker in crew:
                worker.process.join(timeout=30)
                if worker.process.is_alive():
                    worker.process.kill()
        if stop:
            raise Stopped("Stopped; every run under way has saved its state.", signal=stop.signal or 0)
    if failures:
        raise LabError("Some runs failed; the others are done.\n" + "\n".join(failures))


def _idle(crew: list[_Worker], workers: int, runs: Path, save_every: int) -> _Worker | None:
    for worker in crew:
        if worker.run is None and worker.process.is_alive():
            return worker
    crew[:] = [w for w in crew if w.run is not None]
    if len(crew) >= workers:
        return None
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, runs, save_every), daemon=True)
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # inherited: Ctrl-C reaches the whole group, we pass it on
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    theirs.close()
    crew.append(_Worker(process, ours))
    return crew[-1]


def _fail(runs: Path, run: Run, reason: str, failures: list[str], events: Events) -> None:
    Record(runs, run).attempt(failed=reason)
    what, *trace = reason.splitlines()  # the whole of it stands in the record
    where = f" (all of it: {run.hash}/attempts.jsonl)" if trace else ""
    failures.append(f"{run.optimizer.contender}, {run.steps} steps, seed {run.seed}: {what}{where}")
    events.failed(run, reason)


def _work(connection: Connection, runs: Path, save_every: int) -> None:
    """The life of a worker: receive a run, do it, say how it ended; until nobody listens any more."""
    from sophia.lab.tokens import open_cached
    from sophia.lab.training import Progress, train

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
                planned, group = connection.recv()
                run = from_json(Run, planned)
                branches = [trunks.Branch(from_json(Run, config), at) for config, at in group]
            except (EOFError, OSError):
                return
            try:
                tokens = open_cached(run.data.text)
                if tokens is None:
                    raise LabError("the encoded text is gone from the cache; give the same command again")
                result = train(
                    run, runs, tokens, save_every=save_every, stop=stop, report=report, branches=branches
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
