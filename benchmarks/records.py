"""The records that the measurements leave: one JSON file, or a line for each run as it ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from sophia.lab.support import files, provenance


def write(path: Path | None, *, threads: int, **fields: Any) -> None:
    """Write what was measured, with the day, the load of the machine and the environment; nothing if there is
    no path.
    """
    if path is None:
        return
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "load_of_the_machine": round(os.getloadavg()[0], 1),
        "environment": provenance.describe(threads=threads, device="cpu"),
    }
    files.write_json(path, {**about, **fields})


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that grows by a line a run; none if it is not there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on disk before the next run begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
