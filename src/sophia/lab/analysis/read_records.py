"""Reader of a comparison's records, which trusts nothing in them.

A folder may come from somebody else, with its runs in folders or in a pack: names are held to an allow-list
before they become paths, links that lead out of the folder are refused, and a line, file or number that
cannot be read becomes a problem in the report, never a crash and never a silent gap. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophia.lab.config.record_format import EndNumber, zeros_of_curvature
from sophia.lab.records.pack_file import Pack, pack_of, read_pack
from sophia.lab.records.reading import number, read_object
from sophia.lab.records.stored_run import read_run
from sophia.lab.support.errors import LabError
from sophia.lab.support.files import checked_name

__all__ = ["MOST_RUNS", "Evidence", "Row", "Run", "number", "read_evidence"]

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
    """Plan and records of a comparison."""

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
    raw, problem = read_object(root, path)
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
    pack = read_pack(root, pack_of(root / "runs"))
    problems = list(pack.problems)
    runs: dict[tuple[str, int, int], Run] = {}
    for item in _items(raw, "runs"):
        run = _read_run(root, pack, item, contenders, problems)
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
        frozen, problem = read_object(root, root / "protocol.json")
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


def _read_run(
    root: Path, pack: Pack, item: Any, contenders: tuple[str, ...], problems: list[str]
) -> Run | None:
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
    stored = read_run(root, root / "runs", name, pack)
    problems.extend(stored.problems)
    train = tuple(r for r in stored.rows if r.get("kind") == "train")
    result: Row = stored.result
    if train and (zeros := zeros_of_curvature(train[-1])):
        train = tuple({key: row[key] for key in row if key not in zeros} for row in train)
        result = {**result, "unclipped": None}
    status = "unfinished" if stored.started else "missing"
    if stored.ended:
        status = _status(stored.result, name, problems)
    return Run(
        contender,
        int(seed),
        int(steps),
        name,
        status,
        result,
        stored.config,
        train,
        tuple(r for r in stored.rows if r.get("kind") == "eval"),
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
