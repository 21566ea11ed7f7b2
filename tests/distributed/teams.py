"""Teams of gloo processes that stay up for many cases: starting torch costs seconds, a case tenths of one.

A test hands a function and its arguments to a team; every rank runs it, and the test gets the results in
order of rank. A rank that raises, ends or does not answer in time is an error of the test with that rank's
traceback; the team is then thrown away, as its ranks may wait in different collectives, and the next test
gets a fresh one.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sophia import SophiaWarning

CASE_SECONDS = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "sophia"])


class RankFailed(Exception):
    """Some ranks raised, ended or were silent; the text has each one's traceback."""


class Team:
    """``size`` processes with an initialised default process group."""

    def __init__(self, size: int, *, seconds: float = CASE_SECONDS) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name, "store")
        pipes = [_CONTEXT.Pipe() for _ in range(size)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            _CONTEXT.Process(target=_work, args=(rank, size, str(store), theirs, seconds), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def is_whole(self) -> bool:
        """Whether none of its processes has ended since its last case."""
        return all(process.is_alive() for process in self._processes)

    def answers(self, function, *, within: float = CASE_SECONDS, **arguments) -> list[tuple[str, object]]:
        """By rank: ``("ok", value)``, ``("raised", text)``, ``("ended", code)`` or ``("silent", None)``."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found: dict[int, tuple[str, object]] = {}
        deadline = time.monotonic() + within
        while len(found) < self.size and time.monotonic() < deadline:
            open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            for pipe in wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic())):
                rank = open_pipes[pipe]
                try:
                    found[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join(5)
                    found[rank] = ("ended", self._processes[rank].exitcode)
        return [found.get(rank, ("silent", None)) for rank in range(self.size)]

    def close(self) -> None:
        """End the processes that this team started."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(5)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


_teams: dict[int, Team] = {}


@atexit.register
def _close_all() -> None:
    for team in _teams.values():
        team.close()
    _teams.clear()


def run(size: int, function, *, within: float = CASE_SECONDS, **arguments) -> list:
    """Run ``function(**arguments)`` on every rank of a team; what each returned; else RankFailed."""
    answers = failures(size, function, keep_if_ok=True, within=within, **arguments)
    if any(kind != "ok" for kind, _ in answers):
        raise RankFailed("\n".join(f"rank {r} {kind}: {value}" for r, (kind, value) in enumerate(answers)))
    return [value for _, value in answers]


def failures(
    size: int, function, *, keep_if_ok: bool = False, within: float = CASE_SECONDS, **arguments
) -> list[tuple[str, object]]:
    """As ``run``, for cases in which ranks are to fail: the kind of each rank's answer, and the text."""
    # A test of killed workers may have ended one between two cases.
    if size in _teams and not _teams[size].is_whole():
        _teams.pop(size).close()
    if size not in _teams:
        _teams[size] = Team(size)
    answers = _teams[size].answers(function, within=within, **arguments)
    if any("'Stream' object has no attribute 'record_event'" in str(value) for _, value in answers):
        _teams.pop(size).close()
        pytest.skip("torch 2.6 runs fully_shard on GPUs alone: its stream of a CPU records no events")
    if not keep_if_ok or any(kind != "ok" for kind, _ in answers):
        _teams.pop(size).close()
    return answers


def _work(rank: int, size: int, store: str, pipe: Connection, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SophiaWarning)
                answer = ("ok", function(**arguments))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        pipe.send(answer)
    os._exit(0)  # the others may be gone already: a tidy shutdown would wait for them
