"""Quotable sentence: a verdict with the setting it holds for, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sophia.lab.analysis.read_records import Evidence, number
from sophia.lab.analysis.seed_noise import plural
from sophia.lab.analysis.verdict import Summary, Verdict

__all__ = ["quotation", "setting"]


def quotation(summary: Summary, verdict: Verdict) -> str:
    """One verdict and its setting; nothing has to be looked up to know what it is about."""
    unfinished = "" if summary.complete else " (the comparison is unfinished)"
    return f"{verdict.sentence} [{setting(summary.evidence)}{unfinished}]"


def setting(evidence: Evidence) -> str:
    """Model, text, batch, seeds, schedule, protocol and code, as far as the records know them."""
    finished = [r for r in evidence.runs if r.status == "finished"]
    largest = max(finished, key=lambda r: r.steps, default=None)
    parts = []
    if largest is not None:
        tokens, steps = largest.number("tokens"), largest.number("steps")
        size = largest.number("parameters")
        if size is not None:
            parts.append(f"{size / 1e6:.3g}M parameters")
        if tokens is not None and steps:
            parts.append(f"{tokens / steps:,.0f} tokens a step")
    parts.append(plural(len(evidence.seeds), "paired seed"))
    text = evidence.data.get("corpus") or evidence.data.get("name")
    if text:
        parts.append(f"text {_short(text)}")
    schedules = _all(
        r.config["schedule"].get("kind") for r in finished if isinstance(r.config.get("schedule"), dict)
    )
    if schedules:
        parts.append(f"schedule {schedules}")
    if evidence.preset:
        named = f" {evidence.protocol_hash}" if evidence.protocol_hash else ""
        parts.append(f"protocol {_short(evidence.preset)}{named}")
    code = _all(_environment(r.result).get("commit") or _environment(r.result).get("code") for r in finished)
    if code:
        parts.append(f"torch-sophia at {code}")
    return "; ".join(parts)


def _environment(result: Any) -> dict[str, Any]:
    found = result.get("environment")
    return found if isinstance(found, dict) else {}


def _all(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(_short(v) for v in values if v and number(v) is None))


def _short(value: Any) -> str:
    return str(value)[:60]
