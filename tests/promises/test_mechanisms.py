"""The table of mechanisms fits the sources and the tests; that its tests fail without them is shown by
``scripts/take_out_mechanisms.py``.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import take_out_mechanisms
from mechanisms import MECHANISMS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.name)
def test_each_target_is_there(mechanism):
    """A mechanism that was renamed: the script would take out nothing."""
    _, _, original = mechanism.find()
    assert callable(original)
    assert mechanism.instead(original) is not original
    assert mechanism.tests


def test_each_named_test_is_collected():
    """A test that was renamed."""
    tests = sorted({test for mechanism in MECHANISMS for test in mechanism.tests})
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--collect-only", *tests]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert sorted(line for line in found.stdout.splitlines() if "::" in line) == tests


def test_names_are_unlike():
    """Two rows of one name: the words of the command line could not choose one."""
    names = [mechanism.name for mechanism in MECHANISMS]
    assert len(names) == len(set(names)) >= 10


def test_the_script_runs_tests_with_and_without():
    """A script that breaks in silence, or whose tests do not see a missing mechanism."""
    command = [sys.executable, "scripts/take_out_mechanisms.py", "per-example"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 tests pass" in done.stdout
    assert "yes   AssertionError: expected error about" in done.stdout


@pytest.mark.parametrize("error", ["", "skipped", "TypeError: missing an argument"])
def test_what_is_no_failure_for_want_of_the_mechanism(error):
    """A test that passes, or never ran, or fails by a replacement that does not fit."""
    assert take_out_mechanisms.seen({"a": "AssertionError: trace 2.1", "b": "Failed"})[0]
    assert not take_out_mechanisms.seen({"a": "AssertionError: trace 2.1", "b": error})[0]
    assert not take_out_mechanisms.seen({take_out_mechanisms.NONE: "see above"})[0]
