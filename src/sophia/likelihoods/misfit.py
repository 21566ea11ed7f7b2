"""What a loss seems to be that is not the likelihood's."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """Why h would not be the curvature of the loss that is trained."""

    name: str
    """Of its kind, of which is spoken once."""
    cause: str
    """What was seen, and what the loss or the output seems to be."""
    instead: str
    """What to write."""
    nonsense: bool = False
    """Whether h would have nothing to do with the loss: then nothing may move by it."""
    of: str = "mean or weighted cross-entropy"
    """The loss of the likelihood."""
