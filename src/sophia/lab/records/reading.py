"""Files from anybody, read: a link out of the folder, too large a file or a bad line becomes a reason in
words.

Nothing here writes, and nothing raises because of what a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

__all__ = ["MOST_BYTES", "is_row", "number", "parse_lines", "read_object", "read_text"]

MOST_BYTES = 256 * 2**20
"""Larger record files are refused: a report of them would not open in a browser."""


def number(value: object) -> float | None:
    """A finite real number as float; anything else (text, true, NaN) is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:  # an integer beyond the floats
        return None


def read_text(root: Path, path: Path) -> tuple[str, str | None]:
    """The file's text, or why not: it leads out of ``root``, is too large, or cannot be read."""
    try:
        if not path.resolve().is_relative_to(root):
            return "", "it is a link that leads out of the folder"
        if path.stat().st_size > MOST_BYTES:
            return "", f"it is larger than {MOST_BYTES >> 20} MiB"
        return path.read_text(encoding="utf-8", errors="replace"), None
    except (OSError, RuntimeError) as error:  # resolve() raises RuntimeError for a circle of links
        return "", f"it cannot be read ({getattr(error, 'strerror', None) or error})"


def read_object(root: Path, path: Path) -> tuple[dict[str, Any], str | None]:
    """The JSON object in a file, or why it could not be used."""
    text, problem = read_text(root, path)
    if problem is not None:
        return {}, problem
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}, "it is not JSON"
    return (value, None) if isinstance(value, dict) else ({}, "it is not a JSON object")


def is_row(value: object) -> bool:
    """Whether a value can be a row of a log: an object with a number of steps."""
    return isinstance(value, dict) and number(value.get("step")) is not None


def parse_lines(
    text: str, accept: Callable[[object], bool] = lambda value: isinstance(value, dict)
) -> tuple[list[dict[str, Any]], int]:
    """The objects of a text with one a line, in order, and how many lines could not be read.

    A last line that a kill cut short is normal and not counted. ``accept`` says what else a line has to be.
    """
    rows, bad = [], 0
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad += index < len(lines) - 1
            continue
        if accept(row):
            rows.append(row)
        else:
            bad += 1
    return rows, bad
