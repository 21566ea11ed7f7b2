"""What an experiment leaves: a folder of small text files, from which everything else is made again.

``about.json``     the experiment and its version, quick or full, finished or not, where it was run
``records.jsonl``  a row a line, {"case": {...}, "result": {...}}; only ever appended to

An experiment that trains keeps its runs beside them, in ``runs/<hash>`` (see
``sophia.lab.training.run_folder``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.support.errors import LabError
from sophia.lab.support.files import plain, read_json, write_json
from sophia.lab.support.json_lines import append_line, whole_lines

__all__ = ["Case", "Records", "Row"]

Case = Mapping[str, Any]
"""What is varied, by name: plain values, lists of them, or mappings of them."""


@dataclass(frozen=True)
class Row:
    """One case and what came out of it. Numbers that are not finite were written as None."""

    case: dict[str, Any]
    result: dict[str, Any]


class Records:
    """The rows of one experiment in a folder.

    >>> import tempfile
    >>> records = Records(Path(tempfile.mkdtemp()))
    >>> for case in records.left([{"method": "newton", "step": s} for s in (0.1, 1.0)], Progress()):
    ...     records.add(case, steps=int(10 / case["step"]))
    >>> [row.result["steps"] for row in records.where(method="newton")]
    [100, 10]
    >>> list(records.left([{"method": "newton", "step": 0.1}], Progress()))     # it has been done
    []
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "records.jsonl"
        self._environment: dict[str, Any] | None = None
        self.rows: list[Row] = []
        self._done: set[str] = set()
        for row in whole_lines(self._path):  # a last line that a kill cut short is done again
            self._keep(Row(**row))

    @property
    def about(self) -> dict[str, Any]:
        """The content of about.json; empty where there is none."""
        path = self.folder / "about.json"
        return read_json(path) if path.exists() else {}

    @property
    def finished(self) -> bool:
        """Whether the run that made these rows came to its end."""
        return bool(self.about.get("finished"))

    def where(self, **case: Any) -> list[Row]:
        """The rows whose case has these values, in the order in which they were made."""
        return [
            row for row in self.rows if all(row.case.get(name) == _read_back(v) for name, v in case.items())
        ]

    def values(self, name: str) -> list[Any]:
        """The different values of one name of the cases, in the order in which they came."""
        found = {json.dumps(row.case[name]): row.case[name] for row in self.rows if name in row.case}
        return list(found.values())

    def left(self, cases: Iterable[Case], progress: Progress) -> Iterator[Case]:
        """The cases that have no row yet, one after the other; ``progress`` is told of each.

        Raises ``Stopped`` between two cases if a signal asked for it; what was added is on the disk.
        """
        every = list(cases)
        for number, case in enumerate(every):
            progress.case(number, len(every), ", ".join(f"{name} {value}" for name, value in case.items()))
            if _key(case) not in self._done:
                progress.check()
                yield case
        progress.case(len(every), len(every), "")

    def add(self, case: Case, **result: Any) -> None:
        """Write a row to the disk. Raises ``ValueError`` for a case that has one."""
        if _key(case) in self._done:
            raise ValueError(f"the case {dict(case)} has a row already: ask left() which ones have none")
        self._note_environment()
        row = {"case": dict(case), "result": plain(result)}
        append_line(self._path, row, sync=True)
        self._keep(Row(**_read_back(row)))

    def open(self, name: str, *, version: int, quick: bool, environment: Mapping[str, Any]) -> None:
        """Begin, or go on. Raises ``LabError`` if the rows there are another experiment's or another
        version's.
        """
        about, wanted = self.about, {"experiment": name, "version": version, "quick": quick}
        if about and {key: about.get(key) for key in wanted} != wanted:
            raise LabError(
                f"{self.folder} holds records of {about.get('experiment')}, version {about.get('version')}"
                f"{', quick' if about.get('quick') else ''}; rows of {name}, version {version}"
                f"{', quick' if quick else ''}, would mix with them. Move that folder away, or give another "
                "one with --out."
            )
        if not about:
            write_json(self.folder / "about.json", {**wanted, "finished": False, "environments": []})
        self._environment = dict(environment)
        if self._path.exists():
            text = self._path.read_bytes()
            if not text.endswith(b"\n"):
                with self._path.open("ab") as file:
                    file.truncate(text.rfind(b"\n") + 1)

    def finish(self) -> None:
        """Note that the run came to its end."""
        if not self.finished:
            write_json(self.folder / "about.json", {**self.about, "finished": True})

    def _note_environment(self) -> None:
        """Before the first row of this process: where it comes from. A run that adds nothing leaves no
        trace.
        """
        if self._environment is not None:
            about, here = self.about, self._environment
            environments = about.get("environments", [])
            if here not in environments:
                environments = [*environments, here]
            write_json(self.folder / "about.json", {**about, "finished": False, "environments": environments})
            self._environment = None

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self._done.add(_key(row.case))


def _key(case: Case) -> str:
    return json.dumps(case, sort_keys=True)


def _read_back(value: Any) -> Any:
    return json.loads(json.dumps(value))
