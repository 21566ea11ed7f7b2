"""One run as the four files of its folder, and as one line of a pack, whose log stands in columns.

::

    {"run": "43d13ec81a9f", "config": {...}, "result": {...}, "attempts": [{"from_step": 0}],
     "log": {"order": [0, 1, 1, ...],
             "tables": [{"kind": "eval", "step": [0, 100, ...], "loss": [...]},
                        {"kind": "train", "step": [10, 20, ...], ...}]}}

A table holds the rows of one kind that have the same keys in the same order; ``order`` says, for each row of
the log, of which table it is the next. Numbers are written as Python writes them, so all four files come back
byte for byte, and `pack_line` refuses a file of which that is not true.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FILES", "NotPackable", "columns", "files_of", "pack_line", "rows_of"]

FILES = ("config.json", "log.jsonl", "result.json", "attempts.jsonl")

Row = Mapping[str, Any]


class NotPackable(ValueError):
    """What a pack could not give back; the text names the file and the reason."""


def pack_line(name: str, files: Mapping[str, bytes]) -> str:
    """The line of a run from its files by name. Raises `NotPackable` for files that are no run's, or that
    would not come back as they are.
    """
    parts = {
        "config": _object("config.json", files),
        "result": _object("result.json", files),
        "attempts": _rows("attempts.jsonl", files),
    }
    content = {"run": name, **parts, "log": columns(_rows("log.jsonl", files))}
    try:
        line = json.dumps(content, allow_nan=False)
    except ValueError:
        raise NotPackable("one of its files holds NaN or infinity, which JSON does not have") from None
    for file, back in files_of(json.loads(line)).items():
        if back != files[file]:
            raise NotPackable(f"{file} is not written as the lab writes it, so a pack would change its bytes")
    return line


def files_of(content: Mapping[str, Any]) -> dict[str, bytes]:
    """The four files of a run, from the content of its line. Raises ``ValueError`` for a log that is no
    table, or attempts that are no list.
    """
    if not isinstance(content["attempts"], list):
        raise ValueError("its attempts are no list")
    return {
        "config.json": _indented(content["config"]),
        "log.jsonl": _lines(rows_of(content["log"])),
        "result.json": _indented(content["result"]),
        "attempts.jsonl": _lines(content["attempts"]),
    }


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """A log as columns; the inverse of `rows_of`.

    >>> columns([{"kind": "eval", "step": 0}, {"kind": "train", "step": 5}, {"kind": "eval", "step": 9}])
    {'order': [0, 1, 0], 'tables': [{'kind': 'eval', 'step': [0, 9]}, {'kind': 'train', 'step': [5]}]}
    """
    places: dict[tuple[Any, ...], int] = {}
    tables: list[dict[str, Any]] = []
    order = []
    for row in rows:
        kind = row.get("kind") if isinstance(row.get("kind"), str) else None
        place = places.setdefault((kind, *row), len(tables))
        if place == len(tables):
            tables.append({key: kind if key == "kind" and kind is not None else [] for key in row})
        order.append(place)
        for key, column in tables[place].items():
            if isinstance(column, list):
                column.append(row[key])
    return {"order": order, "tables": tables}


def rows_of(log: object) -> list[dict[str, Any]]:
    """The rows of a log in columns. Raises ``ValueError`` where the columns do not fit each other."""
    order, tables = (log.get("order"), log.get("tables")) if isinstance(log, dict) else (None, None)
    if not (isinstance(order, list) and isinstance(tables, list)):
        raise ValueError("it has no order and tables")
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError("one of its tables is not an object")
    if not all(type(place) is int and 0 <= place < len(tables) for place in order):
        raise ValueError("its order names a table that is not there")
    rows_in = Counter(order)
    for place, table in enumerate(tables):
        for key, column in table.items():
            # A text stands for every row of the table; any other value would hide a row that is missing.
            if not isinstance(column, str) and not (
                isinstance(column, list) and len(column) == rows_in[place]
            ):
                raise ValueError(f"its column {key!r:.40} has not one value for each of its rows")
    seen: Counter[int] = Counter()
    rows = []
    for place in order:
        number = seen[place]
        seen[place] += 1
        rows.append({key: c if isinstance(c, str) else c[number] for key, c in tables[place].items()})
    return rows


def _object(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    value = _parsed(name, files[name].decode("utf-8", errors="replace"))
    if not isinstance(value, dict):
        raise NotPackable(f"{name} holds no JSON object")
    return value


def _rows(name: str, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    rows = []
    text = files[name].decode("utf-8", errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        row = _parsed(f"{name}, line {number},", line)
        if not isinstance(row, dict):
            raise NotPackable(f"{name}, line {number}, holds no JSON object")
        rows.append(row)
    return rows


def _parsed(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotPackable(f"{what} is not JSON") from None


def _indented(value: object) -> bytes:
    """As ``support.files.write_json`` writes."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _lines(rows: Sequence[object]) -> bytes:
    """As ``training.run_folder.Record`` appends."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
