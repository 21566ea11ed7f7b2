"""Commits that records name: each is in the history, or the list of those that are not says what then."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from sophia import numerics
from sophia.lab.analysis.made_by import EARLIER, numbers
from sophia.lab.analysis.read_records import read_evidence

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
NAMED = re.compile(r"commit[\"'\s:=]*([0-9a-f]{7,40})\b")


def git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def history():
    """All commits from here back."""
    try:
        if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository").strip() == "true":
            pytest.skip("a source distribution, or a shallow clone")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git")
    return set(git("rev-list", "HEAD").split())


@pytest.fixture(scope="module")
def named():
    """Commits that stand in records, and the files."""
    if not RESULTS.exists():
        pytest.skip("no results here")
    found = {}
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".txt", ".md") and path.is_file():
            for commit in NAMED.findall(path.read_text(encoding="utf-8", errors="replace")):
                found.setdefault(commit, set()).add(path.relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def missing():
    return tomllib.loads((RESULTS / "missing-commits.toml").read_text())


def in_history(commit, history):
    return any(known.startswith(commit) for known in history)


def test_a_record_names_a_commit_that_can_be_looked_up(history, named, missing):
    """Else nobody could say by what code a number was made, or make it again."""
    assert len(named) > 30
    gone = {c: files for c, files in named.items() if not in_history(c, history) and c not in missing}
    assert not gone, (
        f"{gone} name commits that are not in the history: records made on a branch that was rebased? Make "
        "them again from a commit that stays, or write into results/missing-commits.toml what is known"
    )


def test_the_list_holds_what_is_missing_and_nothing_else(history, named, missing):
    """Else it would excuse commits that nobody names, or name others that are not there either."""
    assert set(missing) <= set(named), "no record names these any more"
    assert not [commit for commit in missing if in_history(commit, history)]
    for commit, row in missing.items():
        assert set(row) == {"made", "again", "known"}, commit
        assert row["made"], commit
        assert row["known"].endswith("."), commit
        assert not row["again"] or in_history(row["again"], history), commit


def test_versions_of_numbers_name_commits_of_the_history(history, missing):
    """Else the line of a version could not be looked up."""
    lines = [line for lines in numerics.HISTORY.values() for line in lines]
    assert not [line for line in lines if not in_history(line.split()[0], history)]
    assert not [commit for commit in EARLIER if not in_history(commit, history) and commit not in missing]


def test_every_run_of_a_committed_comparison_is_of_known_numbers(named):
    """Else the report would call a run stale because nobody wrote down what made it."""
    for path in RESULTS.rglob("comparison.json"):
        for run in read_evidence(path.parent).runs:
            if run.result:
                assert None not in numbers(run).values(), (path, run.name)
