"""Help entry of `sophia doctor`; the doctor command itself needs no lab."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Doctor"]


@dataclass(frozen=True)
class Doctor:
    """Check this installation, and whether Sophia finds what it needs in your model.

    Its options: sophia doctor --help.
    """

    def run(self, command: str) -> int:
        """Check, without options: ``sophia.lab.cli`` hands these to the doctor's own parser."""
        from sophia.doctor.command import main

        return main([])
