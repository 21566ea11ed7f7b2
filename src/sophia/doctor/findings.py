"""Result of a check: ok, note or wrong, with a sentence for people and data for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "as_text"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    topic: str
    """Heading under which it stands."""
    status: Literal["ok", "note", "wrong"]
    """Only "wrong" makes the command fail."""
    text: str
    """A sentence; where something is wrong, also what to write instead."""
    data: dict[str, Any] = field(default_factory=dict)
    """The same as values that JSON has."""


def as_text(findings: Sequence[Finding], *, width: int = 110) -> str:
    """The report, as plain text.

    >>> print(as_text([Finding("device", "ok", "cpu"), Finding("loss", "wrong", "it rises")]))
    device
      ok     cpu
    loss
      WRONG  it rises
    <BLANKLINE>
    1 thing is wrong.
    """
    lines: list[str] = []
    topic = None
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            lines.append(topic)
        mark = "WRONG" if finding.status == "wrong" else finding.status
        lines += textwrap.wrap(
            finding.text,
            width,
            initial_indent=f"  {mark:<7}",
            subsequent_indent=" " * 9,
            break_long_words=False,
            break_on_hyphens=False,
        )
    wrong = sum(finding.status == "wrong" for finding in findings)
    end = {0: "Nothing is wrong.", 1: "1 thing is wrong."}.get(wrong, f"{wrong} things are wrong.")
    return "\n".join([*lines, "", end])
