"""The records of a comparison, read back without trusting them.

A folder may come from somebody else: names are held to an allow-list before they become paths, links that
lead out of the folder are refused, and a line, file or number that cannot be read becomes a problem in the
report, never a crash and never a silent gap. Nothing here writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from sophia.lab.config.record_format import EndNumber
from sophia.lab.support.errors import LabError
from sophia.lab.support.files import checked_name

MOST_BYTES = 256 * 2**20
"""Larger record files are refused: a report of them would not open in a browser."""

MOST_RUNS = 10_000

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a comparison, as far as its records go."""

    contender: str
    seed: int
    steps: int
    """The budget it was given."""
    name: str
    status: str
    """"finished", "diverged", "unfinished" (a log without a result), or "missing"."""
    result: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    train: tuple[Row, ...] = ()
    evaluations: tuple[Row, ...] = ()

    def number(self, key: EndNumber) -> float | None:
        """A finite number of the result, or None."""
        return number(self.result.get(key))


@dataclass(frozen=True)
class Evidence:
    """What a comparison set out to do, and what it has recorded."""

    preset: str
    contenders: tuple[str, ...]
    """The baseline first."""
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    """In steps, ascending."""
    data: Row
    comparison: Row
    """All of comparison.json."""
    runs: tuple[Run, ...]
    problems: tuple[str, ...]

    target: float | None = None
    """A loss in nats whose cost is asked for."""
    protocol: Row = field(default_factory=dict)
    """The protocol of protocol.json; empty where there is none (records made before there were protocols)."""
    protocol_hash: str = ""

    @property
    def baseline(self) -> str:
        """The contender that the others are measured against."""
        return self.contenders[0]

    @property
    def linked(self) -> bool:
        """Whether runs of one contender and seed are equal up to where the shorter begins to decay."""
        kinds = (r.config.get("schedule") for r in self.runs)
        return any(isinstance(kind, dict) and kind.get("kind") == "wsd" for kind in kinds)


def number(value: object) -> float | None:
    """A finite real number as float; anything else (text, true, NaN) is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:  # an integer beyond the floats
        return None


def read_evidence(folder: Path) -> Evidence:
    """Read comparison.json and every run it names; raises where the comparison itself cannot be
    understood.
    """
    root = folder.resolve()
    path = root / "comparison.json"
    if not path.is_file():
        raise LabError(
            f"there is no comparison.json in {folder}. A report needs it to know which runs belong together. "
            f"Give the folder that `sophia compare` wrote, or run `sophia compare`."
        )
    raw, problem = _read_json(root, path)
    if problem is not None or raw.get("version") != 1:
        seen = problem or f"version {raw.get('version')!r:.40}"
        raise LabError(
            f"comparison.json could not be used: {seen}. This release reads a JSON object of version 1. "
            f"Make the comparison again, or use the release that wrote it."
        )
    contenders = tuple(checked_name(n, what="contender") for n in _items(raw, "contenders"))
    baseline = checked_name(raw.get("baseline", contenders[0] if contenders else None), what="baseline")
    if baseline not in contenders:
        raise LabError(
            f"comparison.json names the baseline {baseline!r}, which is not among its contenders "
            f"{list(contenders)}. Without it nothing can be compared. Add it to the comparison."
        )
    contenders = (baseline, *(c for c in dict.fromkeys(contenders) if c != baseline))
    problems: list[str] = []
    runs: dict[tuple[str, int, int], Run] = {}
    for item in _items(raw, "runs"):
        run = _read_run(root, item, contenders, problems)
        if run is not None:
            runs[run.contender, run.steps, run.seed] = run
    seeds = tuple(sorted({int(s) for s in _items(raw, "seeds") if number(s) is not None}))
    budgets = tuple(sorted({int(b) for b in _items(raw, "budgets") if (number(b) or 0) > 0}))
    if len(contenders) * len(budgets) * len(seeds) > MOST_RUNS:
        raise LabError(
            f"comparison.json plans {len(contenders) * len(budgets) * len(seeds):,} runs. "
            f"A report holds at most {MOST_RUNS:,}. Split the comparison."
        )
    for contender in contenders:  # planned but never started: comparison.json is the plan
        for steps in budgets:
            for seed in seeds:
                planned = Run(contender, seed, steps, "", "missing")
                runs.setdefault((contender, steps, seed), planned)
    data = raw.get("data")
    frozen: dict[str, Any] = {}
    if (root / "protocol.json").exists():
        frozen, problem = _read_json(root, root / "protocol.json")
        if problem is not None:
            problems.append(f"protocol.json could not be used: {problem}")
    protocol = frozen.get("protocol")
    return Evidence(
        preset=str(raw.get("preset", ""))[:128],
        contenders=contenders,
        seeds=seeds,
        budgets=budgets,
        data=data if isinstance(data, dict) else {"data": data} if data else {},
        comparison=raw,
        runs=tuple(runs[key] for key in sorted(runs, key=lambda k: (contenders.index(k[0]), k[1], k[2]))),
        problems=tuple(problems),
        target=number(raw.get("target")),
        protocol=protocol if isinstance(protocol, dict) else {},
        protocol_hash=str(frozen.get("hash", ""))[:64],
    )


def _items(raw: Row, key: str) -> list[Any]:
    value = raw.get(key)
    return value if isinstance(value, list) else []


def _read_run(root: Path, item: Any, contenders: tuple[str, ...], problems: list[str]) -> Run | None:
    if not isinstance(item, dict):
        problems.append("comparison.json lists a run that is not an object; it was left out")
        return None
    name = checked_name(item.get("run"), what="run")
    contender = checked_name(item.get("contender"), what="contender")
    seed, steps = number(item.get("seed")), number(item.get("steps"))
    if contender not in contenders or seed is None or steps is None or steps <= 0:
        problems.append(
            f"run {name}: its contender, seed or steps are not those of the comparison; it was left out"
        )
        return None
    folder = root / "runs" / name
    result: dict[str, Any] = {}
    status, rows = "missing", []
    if (folder / "log.jsonl").exists():
        rows, status = _read_log(root, folder / "log.jsonl", name, problems), "unfinished"
    if (folder / "result.json").exists():
        result, problem = _read_json(root, folder / "result.json")
        if problem is not None:
            problems.append(
                f"run {name}: result.json could not be used: {problem}; the run counts as unfinished"
            )
            status = "unfinished"
        else:
            status = _status(result, name, problems)
    config: dict[str, Any] = {}
    if (folder / "config.json").exists():
        config, problem = _read_json(root, folder / "config.json")
        if problem is not None:
            problems.append(f"run {name}: config.json could not be used: {problem}")
    return Run(
        contender,
        int(seed),
        int(steps),
        name,
        status,
        result,
        config,
        tuple(r for r in rows if r.get("kind") == "train"),
        tuple(r for r in rows if r.get("kind") == "eval"),
    )


def _status(result: Row, name: str, problems: list[str]) -> str:
    """A finished run without a finite loss has diverged, whatever it says of itself."""
    status = result.get("status")
    if status == "finished" and number(result.get("loss")) is None:
        problems.append(
            f"run {name}: says it finished, but its loss is no finite number; it counts as diverged"
        )
        return "diverged"
    if status in ("finished", "diverged"):
        return str(status)
    problems.append(f"run {name}: has the unknown status {status!r:.40}; it counts as unfinished")
    return "unfinished"


def _text(root: Path, path: Path) -> tuple[str, str | None]:
    """The file's text, or why not: it leads out of the folder, is too large, or cannot be read."""
    if not path.resolve().is_relative_to(root):
        return "", "it is a link that leads out of the folder"
    try:
        if path.stat().st_size > MOST_BYTES:
            return "", f"it is larger than {MOST_BYTES >> 20} MiB"
        return path.read_text(encoding="utf-8", errors="replace"), None
    except OSError as error:
        return "", f"it cannot be read ({error.strerror})"


def _read_json(root: Path, path: Path) -> tuple[dict[str, Any], str | None]:
    text, problem = _text(root, path)
    if problem is not None:
        return {}, problem
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}, "it is not JSON"
    return (value, None) if isinstance(value, dict) else ({}, "it is not a JSON object")


def _read_log(root: Path, path: Path, name: str, problems: list[str]) -> list[dict[str, Any]]:
    """Rows in order; a last line cut short by a kill is normal, any other unreadable line is counted."""
    text, problem = _text(root, path)
    if problem is not None:
        problems.append(f"run {name}: log.jsonl could not be used: {problem}")
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
        if isinstance(row, dict) and number(row.get("step")) is not None:
            rows.append(row)
        else:
            bad += 1
    if bad:
        problems.append(f"run {name}: {bad} line(s) of log.jsonl could not be read and were left out")
    return rows
