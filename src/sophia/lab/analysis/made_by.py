"""Records of other numbers than today's: which runs Sophia's code of today would not make again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sophia.lab.analysis.read_records import Run
from sophia.numerics import VERSIONS, read, words

__all__ = ["notice", "numbers", "other_code", "stale", "today"]

EARLIER: Mapping[str, str] = {
    "6c421e118502": "",
    "68f9b4d452c7": "",
    "0ed5c934de34": "",
    "0c26e8b2ceb6": "",
    "537d6284be65": "",
    "6bf50a1a953f": "gnb 2",
    "ec038a64f088": "gnb 2, damped 3, spectral 2",
}
"""Numerics of the commits that made the committed comparisons before a result named its numerics; what is not
named is at its first version.
"""


def numbers(run: Run) -> dict[str, int | None]:
    """The versions of the parts that a run used; None where nobody can say."""
    environment = _mapping(run.result.get("environment"))
    named = environment.get("numerics")
    if isinstance(named, str):
        return dict(read(named))
    earlier = EARLIER.get(_commit(run))
    known = None if earlier is None else read(earlier)
    return {part: None if known is None else known.get(part, 1) for part in _parts(run)}


def stale(run: Run) -> bool:
    """Whether today's code computes other numbers than the run that ended, or may do so."""
    return bool(run.result) and any(VERSIONS.get(part, v) != v for part, v in _of_now(run).items())


def other_code(runs: Iterable[Run]) -> str:
    """How many runs were made by code with other numbers, by which and how; empty if none was.

    A part that has never changed cannot be of another version, whoever made the run.
    """
    runs = tuple(runs)
    groups: dict[tuple[str, str], int] = {}
    for run in runs:
        if stale(run):
            key = run.contender, _difference(run)
            groups[key] = groups.get(key, 0) + 1
    if not groups:
        return ""
    count, ways = sum(groups.values()), dict.fromkeys(how for _, how in groups)
    said = list(ways) if len(ways) == 1 else [f"{n} of {who}: {how}" for (who, how), n in groups.items()]
    verb = "was" if count == 1 else "were"
    return f"{count} of {len(runs)} runs {verb} made by other code ({', and '.join(said)})"


def notice(runs: Iterable[Run]) -> str:
    """The same for those who read a verdict, and what it means for them; empty if there is nothing to say."""
    runs = tuple(runs)
    said = other_code(runs)
    names = " and ".join(dict.fromkeys(run.contender for run in runs if stale(run)))
    return said and (
        f"{said}. What is said of {names} is about that code, and not about today's. For today's, compare "
        "again in another folder."
    )


def today(runs: Iterable[Run]) -> str:
    """Today's versions of the parts that some runs used."""
    return words({part: VERSIONS[part] for run in runs for part in _of_now(run) if part in VERSIONS})


def _of_now(run: Run) -> dict[str, int | None]:
    return {part: v for part, v in numbers(run).items() if v is not None or VERSIONS.get(part, 1) != 1}


def _difference(run: Run) -> str:
    """The commit, its numerics and today's, of the parts that differ."""
    differing = {part: v for part, v in _of_now(run).items() if VERSIONS.get(part, v) != v}
    now = words({part: VERSIONS[part] for part in differing}, ones=True)
    known = {part: v for part, v in differing.items() if v is not None}
    then = f"numerics {words(known, ones=True)}" if known else "numerics not recorded"
    return f"{_commit(run)[:7] or 'commit unknown'}, {then}; today {now}"


def _parts(run: Run) -> tuple[str, ...]:
    """Of a run that does not name them, by its settings."""
    settings = _mapping(_mapping(run.config.get("optimizer")).get("settings"))
    rule, estimator = settings.get("rule"), settings.get("estimator")
    if isinstance(rule, str):
        return "gnb", rule
    return (estimator, "paper") if isinstance(estimator, str) else ()


def _commit(run: Run) -> str:
    commit = _mapping(run.result.get("environment")).get("commit")
    found = re.match(r"[0-9a-f]{7,40}", commit) if isinstance(commit, str) else None
    return found[0] if found else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
