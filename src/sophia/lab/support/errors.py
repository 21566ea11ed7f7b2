"""What the lab says when it refuses: an error with a text for the reader and an exit code for the shell."""

from __future__ import annotations

__all__ = ["LabError", "Stopped", "UsageError"]


class LabError(Exception):
    """Something the lab cannot go on with. Its text says what was seen, why it cannot work, what to do
    instead.

    The command line prints the text without a traceback and exits with ``code``.
    """

    code = 1


class UsageError(LabError):
    """A value given by the user cannot work; nothing was written."""

    code = 2


class Stopped(LabError):
    """A signal asked to stop; the state was saved. ``code`` is 128 + signal, as shells expect."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.code = 128 + signal
