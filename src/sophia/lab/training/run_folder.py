"""Folder of a run's records, named by the hash of its configuration.

``config.json``     the configuration
``log.jsonl``       one row a line, {"kind": "train" | "eval", "step": ..., ...}; only ever appended to
``result.json``     written once, when the run has ended
``attempts.jsonl``  one row for each start: a run that was killed and went on shows that here

The keys of rows and result stand in ``sophia.lab.config.record_format``.

A run that has ended may have been packed (`sophia pack`): then it is a line of ``runs.jsonl``, beside the
folder of runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from sophia.lab.config.record_format import EndRow
from sophia.lab.config.run import Run
from sophia.lab.records.pack_file import pack_of, read_pack_once
from sophia.lab.records.stored_run import StoredRun, read_run
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.files import checked_name, out_of_space_named, plain, read_json, write_json
from sophia.lab.support.json_lines import append_line, whole_lines

__all__ = ["Record", "Silent", "rows"]


class Record:
    """Records of one run, in a folder of its own."""

    def __init__(self, runs: Path, config: Run) -> None:
        self.config = config
        self.folder = runs / checked_name(config.hash, what="run")
        self.log = self.folder / "log.jsonl"
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def open(self) -> None:
        """Make the folder, or check that the one that is there belongs to this configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        if not path.exists():
            write_json(path, to_json(self.config))
            return
        seen = from_json(Run, read_json(path))
        if seen != self.config:
            theirs, ours = to_json(seen), to_json(self.config)
            keys = ", ".join(k for k in ours if ours[k] != theirs[k])
            raise LabError(
                f"The run {self.folder.name} was started with other values of {keys}, so going on would mix "
                f"two runs. "
                "Give another output folder."
            )

    def result(self) -> EndRow | None:
        """What the run ended with, or None if it has not ended. Raises ``LabError`` for a damaged pack."""
        if (packed := self._packed()) is not None:
            return cast(EndRow, dict(packed.result))
        path = self.folder / "result.json"
        return cast(EndRow, read_json(path)) if path.exists() else None

    @property
    def begun(self) -> bool:
        """Whether anything of the run is there."""
        return self.folder.exists() or self._packed() is not None

    def _packed(self) -> StoredRun | None:
        """The run in the pack beside the folder of runs, if it is there.

        A pack with a line that cannot be read is refused: the run may be that line, and would be trained
        again.
        """
        runs = self.folder.parent
        if runs.name != "runs":
            return None
        pack = read_pack_once(pack_of(runs))
        if self.folder.name not in pack.runs and not pack.problems:
            return None
        stored = read_run(runs.parent, runs, self.folder.name, pack)
        problems = (*pack.problems, *stored.problems)
        if not problems and not _is_of(stored, self.config):
            problems = (f"the run {self.folder.name} has another configuration than its name says",)
        if problems:
            raise LabError(
                f"{pack_of(runs)} is damaged: {problems[0]}. So it cannot be told which runs have ended, and "
                "going on could train one of them again. Restore the file; or delete what cannot be read, "
                "and those runs are trained again."
            )
        return stored

    def finish(self, result: EndRow) -> None:
        """Record the end. Numbers that are not finite become null."""
        write_json(self.folder / "result.json", plain(result))

    def attempt(self, **what: int | str) -> None:
        """Note that the run was started, and where, or that it failed, and why."""
        append_line(self.folder / "attempts.jsonl", what)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log, and tell the listeners. Numbers that are not finite become null."""
        written: dict[str, Any] = plain(dict(row))
        append_line(self.log, written)
        for listen in self.listeners:
            listen(written)

    def sync(self) -> int:
        """Bring the log to the disk and return its length in bytes, to be kept in a checkpoint."""
        with out_of_space_named(self.log), self.log.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, length: int) -> None:
        """Drop what was logged after a checkpoint: those steps are done again, and rows are neither lost nor
        repeated.
        """
        with self.log.open("ab") as file:
            if file.tell() < length:
                raise LabError(
                    f"The log of the run {self.folder.name} is shorter than at its checkpoint, so it was "
                    f"changed. "
                    "Delete that folder to start the run again."
                )
            file.truncate(length)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the log."""
        if (packed := self._packed()) is not None:
            return (dict(row) for row in packed.rows)
        return rows(self.folder)


class Silent(Record):
    """Records for the other processes of a run: reads what is there, writes nothing."""

    def open(self) -> None:
        """Leave it to the first process."""

    def finish(self, result: EndRow) -> None:
        """Leave it to the first process."""

    def attempt(self, **what: int | str) -> None:
        """Leave it to the first process."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Leave it to the first process."""

    def sync(self) -> int:
        """Nothing was written."""
        return 0

    def cut(self, length: int) -> None:
        """Leave it to the first process."""


def _is_of(stored: StoredRun, config: Run) -> bool:
    try:
        return from_json(Run, dict(stored.config)) == config
    except UsageError:
        return False


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the log in a run's folder. A last line that a kill cut short is left out."""
    return whole_lines(folder / "log.jsonl")
