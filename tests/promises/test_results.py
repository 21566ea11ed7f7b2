"""The records in ``results``: each said in its README, all of them whole, and none of them a picture."""

import re
import subprocess
from pathlib import Path

import pytest

from sophia.lab.cli import commands
from sophia.lab.records.stored_run import stored_runs

ROOT = Path(__file__).parents[2]
RESULTS, IMAGES = ROOT / "results", ROOT / "docs" / "images"

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="the records are not in the source distribution"
)


def committed(folder):
    """The files that git has, or would take, as paths relative to a folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return sorted(path for line in listed.splitlines() if (folder / (path := Path(line))).exists())


def lines(heading):
    """The rows of the table under a heading of the README, by the name in the first cell."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    (part,) = (part for part in text.split("\n## ") if part.startswith(f"{heading}\n"))
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", part, flags=re.MULTILINE)
    assert len(rows) == len({name for name, _ in rows}), "an entry stands twice"
    return dict(rows)


def test_every_entry_has_its_line_and_every_line_its_entry():
    """A record of which nobody knows what it is, or a line about one that is gone."""
    about = {Path("README.md"), Path("missing-commits.toml")}
    files = [path for path in committed(RESULTS) if path not in about]
    kinds = {path.parts[0] for path in files}
    assert kinds == {"audits", "benchmarks", "comparisons", "experiments", "searches", "studies"}
    for kind in sorted(kinds):
        assert {path.parts[1] for path in files if path.parts[0] == kind} == set(lines(kind)), kind


def test_every_line_names_the_command_that_makes_it():
    """A figure that cannot be made again."""
    known = commands()
    for kind in ("comparisons", "searches", "experiments", "benchmarks", "audits", "studies", "Pictures"):
        for name, rest in lines(kind).items():
            made = rest.rsplit(" | ", 1)[-1]
            assert "`" in made or (kind, name) == ("searches", "quick"), f"{kind}/{name} names no command"
            for command in re.findall(r"`sophia (\w+)", made):
                assert command in known, f"{kind}/{name}: there is no sophia {command}"
            for path in re.findall(r"benchmarks/[\w./-]+\.(?:py|toml)", made):
                assert (ROOT / path).exists(), f"{kind}/{name}: there is no {path}"


def test_runs_are_packed_and_whole():
    """Four files a run, so that a search through the project finds little else; or a damaged line."""
    packs = {run.place for run in stored_runs(RESULTS)}
    assert {place.name for place in packs} == {"runs.jsonl"}, "write: sophia pack FOLDER"
    assert {p.parent for p in packs} == {p.parent for p in RESULTS.rglob("comparison.json")}
    for run in stored_runs(RESULTS):
        assert not run.problems
        assert run.ended
        assert run.config
        assert run.rows
        assert run.attempts
    assert len(committed(RESULTS)) < 160


def test_pictures_lie_where_a_page_shows_them_and_nowhere_else():
    """A clone of which most bytes are pictures, or a page with a hole."""
    assert not [path for path in committed(RESULTS) if path.suffix in (".png", ".svg", ".html")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    shown = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+\.(?:png|svg))\)", page.read_text(encoding="utf-8"))
        if "://" not in link
    }
    there = {(IMAGES / path).resolve() for path in committed(IMAGES)}
    assert shown == there
    assert {path.parts[0] for path in committed(IMAGES)} == set(lines("Pictures"))


def test_every_path_into_results_that_a_page_or_a_program_names_is_there():
    """A link that a move has broken."""
    for path in committed(ROOT):
        source = ROOT / path
        if path.suffix not in (".md", ".py", ".toml") or path.parts[0] == "tests":
            continue
        text = source.read_text(encoding="utf-8")
        for found in re.findall(r"(?<![\w/])(?:\.\./)*results/([\w./*-]*[\w-])", text):
            if found.rpartition("/")[2] != "NAME":
                assert list(RESULTS.glob(found)), f"{source}: there is no results/{found}"
