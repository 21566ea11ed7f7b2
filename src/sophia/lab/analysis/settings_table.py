"""Table of settings: which differ between contenders, and which are the same for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sophia.lab.analysis.read_records import Evidence, Run

LONGEST = 300


@dataclass(frozen=True)
class Setting:
    """One setting, by its dotted name, with a value in words for each contender (an em dash where it has
    none).
    """

    name: str
    values: tuple[str, ...]

    @property
    def same(self) -> bool:
        """True if all contenders have the same value."""
        return len(set(self.values)) <= 1


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, the values as JSON.

    >>> flat({"optimizer": {"lr": 0.001, "betas": [0.9, 0.95]}})
    {'optimizer.lr': '0.001', 'optimizer.betas': '[0.9, 0.95]'}
    """
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    text = value if isinstance(value, str) else json.dumps(value)
    return {prefix[:LONGEST]: text if len(text) <= LONGEST else text[:LONGEST] + " ..."}


def example(evidence: Evidence, contender: str) -> Run | None:
    """The contender's first run with a configuration at its largest budget: what the side-by-side table
    shows.
    """
    runs = [r for r in evidence.runs if r.contender == contender and r.config]
    return max(runs, key=lambda r: (r.steps, -r.seed), default=None)


def side_by_side(evidence: Evidence) -> tuple[Setting, ...]:
    """All settings in the order of the configurations, without the seed; those that differ first."""
    columns = []
    for contender in evidence.contenders:
        run = example(evidence, contender)
        columns.append({} if run is None else flat({k: v for k, v in run.config.items() if k != "seed"}))
    names = dict.fromkeys(name for column in columns for name in column)
    settings = [Setting(name, tuple(column.get(name, "—") for column in columns)) for name in names]
    return tuple(sorted(settings, key=lambda s: s.same))
