"""Whether tests see that a mechanism is missing: python scripts/take_out_mechanisms.py [WORDS ...].

Runs the tests of ``mechanisms.py`` as they are, where all must pass; then, for each mechanism, its own tests
in a process in which it is taken out, where all must fail. With words, only mechanisms that have one of them
in their name. Prints a table; the exit code is 1 if a test does not do what it must.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mechanisms import MECHANISMS, Mechanism

_FORK = multiprocessing.get_context("fork")
NONE = "no test ran"
_BROKEN = ("TypeError", "AttributeError", "NameError", "ImportError", "KeyError")
"""Errors that speak of the replacement and not of the library without the mechanism."""


class Outcomes:
    """Plugin: the first line of the error of each test, "" for one that passed."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what happened."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr) if crash is None else crash.message
            self.of[report.nodeid] = text.strip().split("\n")[0] or "failed"
        elif report.skipped:
            self.of[report.nodeid] = "skipped"
        else:
            self.of.setdefault(report.nodeid, "")


def run(tests: Iterable[str], without: Mechanism | None = None) -> dict[str, str]:
    """What becomes of tests in a process of their own, less a mechanism."""
    # Forked: torch is imported once. Nothing has been computed here, so there are no threads to lose.
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(list(tests), without, sender))
    process.start()
    sender.close()
    try:
        outcomes: dict[str, str] = receiver.recv()
    except EOFError:
        outcomes = {}
    process.join()
    return outcomes or {NONE: "see what pytest says above"}


def _run(tests: list[str], without: Mechanism | None, sender: Connection) -> None:
    if without is not None:
        without.take_out()
    outcomes, heard = Outcomes(), io.StringIO()
    with redirect_stdout(heard):
        code = pytest.main(["-n", "0", "-q", "--no-header", *tests], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(heard.getvalue(), flush=True)
    sender.send(outcomes.of)


def seen(outcomes: dict[str, str]) -> tuple[bool, str]:
    """Whether all tests saw that the mechanism is missing, and what to say of it."""
    for test, error in outcomes.items():
        if error in ("", "skipped") or error.split(":")[0] in _BROKEN or test == NONE:
            return False, f"{test}: {error or 'passed'}"
    return True, next(iter(outcomes.values()))


def compared(chosen: Sequence[Mechanism]) -> bool:
    """Run all, print the table; whether every test did what it must."""
    tests = dict.fromkeys(test for mechanism in chosen for test in mechanism.tests)
    began = time.monotonic()
    as_they_are = run(tests)
    wrong = {test: error for test, error in as_they_are.items() if error}
    print(f"as they are: {len(as_they_are) - len(wrong)} of {len(as_they_are)} tests pass", flush=True)
    for test, error in wrong.items():
        print(f"  {test}: {error}")
    right = not wrong
    width = max(len(mechanism.name) for mechanism in chosen)
    print(f"{'taken out':{width}}  tests  seen  what the first of them says")
    for mechanism in chosen:
        outcomes = run(mechanism.tests, without=mechanism)
        good, words = seen(outcomes)
        right &= good
        line = f"{mechanism.name:{width}}  {len(outcomes):5}  {'yes' if good else 'NO':4}  {words}"
        print(line[:200] if good else line, flush=True)
    print(f"{len(chosen)} mechanisms in {time.monotonic() - began:.0f} s")
    return right


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the names of mechanisms; all by default")
    given = parser.parse_args()
    chosen = [m for m in MECHANISMS if not given.words or any(word in m.name for word in given.words)]
    if not chosen:
        names = "\n  ".join(mechanism.name for mechanism in MECHANISMS)
        raise SystemExit(f"no mechanism has {given.words} in its name; there are\n  {names}")
    os.chdir(Path(__file__).parents[1])
    torch.set_num_threads(1)
    raise SystemExit(0 if compared(chosen) else 1)


if __name__ == "__main__":
    main()
