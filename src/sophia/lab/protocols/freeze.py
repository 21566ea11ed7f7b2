"""What is decided before the first run is written first, and does not change afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia.lab.records.pack_file import NAME
from sophia.lab.support.dataclass_json import differences
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import read_json, write_json

__all__ = ["begun", "check", "write"]


def check(folder: Path, frozen: Mapping[str, Mapping[str, Any]], *, what: str) -> bool:
    """Whether this comparison (or sweep) was begun in the folder: whether the files are there, with this
    content. Writes nothing.

    Raises ``UsageError`` if the folder holds another one, naming the keys that differ, or foreign files.
    """
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # Runs are named by what they are: those of others do no harm, and a sweep's are at home in a comparison.
    if folder.is_file() or (inside - {"lock"} and not inside & {"runs", NAME, *frozen}):
        raise UsageError(
            f"{folder} is there already and holds no {what}; writing into it would mix two things. "
            "Give another folder with --out."
        )
    begun = False
    for name, content in frozen.items():
        if not (folder / name).exists():
            continue
        begun = True
        keys = [
            key.removeprefix("protocol.")
            for key in differences(read_json(folder / name), dict(content))
            if key not in ("hash", "runs")
        ]
        if keys or read_json(folder / name) != content:
            raise UsageError(
                f"{folder} holds another {what}: it differs in {', '.join(keys) or 'its runs'}. "
                "Going on would mix the two. Give the options it was started with, or another folder with "
                "--out."
            )
    return begun


def begun(folder: Path, started: bool, *, resume: bool, what: str) -> None:
    """Raise ``UsageError`` if one is to go on here that never began: most often a misspelt folder or option.
    Without ``resume`` nothing has to be asked: what is there is the same, and goes on.
    """
    if resume and not started:
        raise UsageError(
            f"{folder} holds no {what} that was begun, so there is nothing to resume. Look whether folder "
            "and options are those of the first time; or leave out --resume to begin it."
        )


def write(folder: Path, frozen: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what is not there yet."""
    for name, content in frozen.items():
        if not (folder / name).exists():
            write_json(folder / name, content)
