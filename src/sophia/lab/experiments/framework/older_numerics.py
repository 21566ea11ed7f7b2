"""Records of other numbers than today's: what is said to those who read a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sophia.lab.experiments.framework.definition import Experiment
from sophia.lab.experiments.framework.records import Records
from sophia.numerics import VERSIONS, read

__all__ = ["notice", "other_versions"]


def notice(experiment: Experiment, records: Records) -> str:
    """Which parts of Sophia had other numbers when rows were made, and what they were; empty if none had."""
    found = other_versions(experiment.parts, records.about.get("environments", ()))
    if not found:
        return ""
    said = "; ".join(
        f"{part} {' and '.join(str(v or 'unknown') for v in were)}, today {VERSIONS[part]}"
        for part, were in found.items()
    )
    return f"Rows were made by code of other numbers ({said}); what is said here is about that code."


def other_versions(
    parts: Sequence[str], environments: Sequence[Mapping[str, object]]
) -> dict[str, list[int]]:
    """Of each part that was not at today's version, the versions that it had; 0 for one that was not noted.

    An environment that notes versions, but none of a part, has no row of it. A part that has never changed
    cannot be of another version, whoever made the row.
    """
    found: dict[str, list[int]] = {}
    for part in parts:
        known = {_version(part, environment.get("numerics")) for environment in environments}
        if other := known - {None, VERSIONS[part]}:
            found[part] = sorted(v for v in other if v is not None)
    return found


def _version(part: str, named: object) -> int | None:
    """By a text of versions; None where it does not have the part, 0 where there is no text."""
    if isinstance(named, str):
        return read(named).get(part)
    return 0 if VERSIONS[part] != 1 else 1
