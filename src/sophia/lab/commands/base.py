"""Interface of a subcommand."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Command"]


class Command(Protocol):
    """Options as fields, whose texts are the help, and a method that runs the command."""

    def run(self, command: str) -> int:
        """Do it and return the exit code. ``command`` is the command line without --resume, to be shown after
        a stop.

        Raises ``LabError`` where it cannot go on.
        """
