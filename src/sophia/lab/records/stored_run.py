"""What is stored of a run, in a folder of its own or in a pack, read as one and the same thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophia.lab.records.pack_file import NAME, Pack, pack_of, read_pack
from sophia.lab.records.packed_run import rows_of
from sophia.lab.records.reading import is_row, parse_lines, read_object, read_text
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import checked_name

__all__ = ["StoredRun", "read_run", "stored_runs"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StoredRun:
    """A run as far as its records go."""

    name: str
    """The hash of its configuration, which names its folder or stands in its line."""
    place: Path
    """Its folder, or the pack that holds it."""
    started: bool = False
    """Whether there is a log."""
    ended: bool = False
    """Whether there is a result that could be read."""
    config: Row = field(default_factory=dict)
    result: Row = field(default_factory=dict)
    attempts: tuple[Row, ...] = ()
    """A row for each start."""
    rows: tuple[Row, ...] = ()
    """Those of its log."""
    problems: tuple[str, ...] = ()
    """What could not be read, and why."""


def read_run(root: Path, runs: Path, name: str, pack: Pack) -> StoredRun:
    """A run by its name, from the pack of a folder of runs or else from the folder.

    The pack comes first: where both have a run, packing or unpacking was cut short, and the pack is the whole
    one. ``root`` is the resolved folder that no file may lead out of.
    """
    content = pack.runs.get(name)
    return _in_folder(root, runs / name) if content is None else _in_pack(pack_of(runs), name, content)


def stored_runs(path: Path) -> Iterator[StoredRun]:
    """Every run stored under a path, in folders and in packs, in the order of the paths and names.

    A line of a pack that is no run is given too, as a run without a name that has a problem.
    """
    root = path.resolve()
    inside = {found.parent for name in (NAME, "runs") for found in root.rglob(name) if _holds_runs(found)}
    if root.name in (NAME, "runs"):
        inside.add(root.parent)
    for folder in sorted(inside):
        runs = folder / "runs"
        pack = read_pack(folder, pack_of(runs))
        for problem in pack.problems:
            yield StoredRun("", pack_of(runs), problems=(problem,))
        there = {each.name for each in runs.iterdir() if each.is_dir()} if runs.is_dir() else set()
        for name in sorted({*pack.runs, *filter(_is_name, there)}):
            yield read_run(folder, runs, name, pack)


def _holds_runs(path: Path) -> bool:
    return path.is_file() if path.name == NAME else path.is_dir() and not path.is_symlink()


def _is_name(name: str) -> bool:
    try:
        checked_name(name)
    except UsageError:
        return False
    return True


def _in_folder(root: Path, folder: Path) -> StoredRun:
    name, problems = folder.name, []
    rows: list[dict[str, Any]] = []
    if started := (folder / "log.jsonl").exists():
        text, problem = read_text(root, folder / "log.jsonl")
        rows, bad = parse_lines(text, is_row)
        if problem is not None:
            problems.append(f"run {name}: log.jsonl could not be used: {problem}")
        if bad:
            problems.append(f"run {name}: {bad} line(s) of log.jsonl could not be read and were left out")
    result: dict[str, Any] = {}
    if ended := (folder / "result.json").exists():
        result, problem = read_object(root, folder / "result.json")
        if problem is not None:
            ended = False
            problems.append(
                f"run {name}: result.json could not be used: {problem}; the run counts as unfinished"
            )
    config: dict[str, Any] = {}
    if (folder / "config.json").exists():
        config, problem = read_object(root, folder / "config.json")
        if problem is not None:
            problems.append(f"run {name}: config.json could not be used: {problem}")
    attempts, _ = parse_lines(read_text(root, folder / "attempts.jsonl")[0])
    # A result that cannot be read is of a run that was started all the same.
    started = started or (folder / "result.json").exists()
    return StoredRun(
        name, folder, started, ended, config, result, tuple(attempts), tuple(rows), tuple(problems)
    )


def _in_pack(path: Path, name: str, content: Row) -> StoredRun:
    problems = []
    rows: list[dict[str, Any]] = []
    try:
        every = rows_of(content["log"])
        rows = [row for row in every if is_row(row)]
        if bad := len(every) - len(rows):
            problems.append(f"run {name}: {bad} row(s) of its log in {NAME} are none and were left out")
    except ValueError as error:
        problems.append(f"run {name}: its log in {NAME} could not be used: {error}")
    parts = {}
    for key, then in (("result", "; the run counts as unfinished"), ("config", "")):
        parts[key] = value = content[key]
        if not isinstance(value, dict):
            problems.append(f"run {name}: its {key} in {NAME} could not be used: it is no object{then}")
            parts[key] = {}
    ended = isinstance(content["result"], dict)
    attempts = content["attempts"] if isinstance(content["attempts"], list) else []
    starts = tuple(row for row in attempts if isinstance(row, dict))
    return StoredRun(
        name, path, True, ended, parts["config"], parts["result"], starts, tuple(rows), tuple(problems)
    )
