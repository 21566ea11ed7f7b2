"""A pack: ``runs.jsonl``, beside the folder ``runs`` that it stands for, a line a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophia.lab.records.reading import read_text
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import checked_name

__all__ = ["NAME", "Pack", "pack_of", "read_pack", "read_pack_once"]

NAME = "runs.jsonl"
KEYS = ("run", "config", "result", "attempts", "log")


@dataclass(frozen=True)
class Pack:
    """The runs of a pack by name, each as the content of its line, and what could not be read."""

    runs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def pack_of(runs: Path) -> Path:
    """The pack of a folder of runs, there or not."""
    return runs.with_name(NAME)


def read_pack(root: Path, path: Path) -> Pack:
    """Every run of a pack; a line that is none becomes a problem. Without a file there are none.

    ``root`` is the folder that the file may not lead out of, as ``Path.resolve`` gives it.
    """
    if not path.exists() and not path.is_symlink():
        return Pack()
    text, problem = read_text(root, path)
    if problem is not None:
        return Pack(problems=(f"{NAME} could not be used: {problem}",))
    runs: dict[str, Mapping[str, Any]] = {}
    problems = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        content, problem = _content(line)
        if problem is None and content["run"] in runs:
            problem = f"it holds the run {content['run']} a second time"
        if problem is None:
            runs[content["run"]] = content
        else:
            problems.append(f"line {number} of {NAME} was left out: {problem}")
    return Pack(runs, tuple(problems))


def read_pack_once(path: Path) -> Pack:
    """The same, read again only when the file has changed: a plan asks for each of its runs."""
    try:
        status = path.stat()
    except OSError:  # not there, or a link to nowhere, which `read_pack` tells apart
        return read_pack(path.parent.resolve(), path)
    return _read_once(path, status.st_ino, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _read_once(path: Path, *state: int) -> Pack:
    return read_pack(path.parent.resolve(), path)


def _content(line: str) -> tuple[Any, str | None]:
    """The object of a line, or why it is none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None, "it is not JSON"
    if not isinstance(content, dict) or set(content) != set(KEYS):
        return None, f"it is no object of {', '.join(KEYS)}"
    try:
        checked_name(content["run"], what="run")
    except UsageError as error:
        return None, str(error)
    return content, None
