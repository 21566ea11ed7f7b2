"""Records that grow by a line: one JSON object each, never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sophia.lab.support.files import out_of_space_named

__all__ = ["append_line", "whole_lines"]


def append_line(path: Path, row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add a row; with ``sync`` it is on the disk when this returns. NaN and infinity are refused."""
    line = json.dumps(row, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with out_of_space_named(path), path.open("a", encoding="utf-8") as file:
        file.write(line)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows; none if the file is not there. A last line that a kill cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
