"""Losses and outputs that are not what the likelihood says: refused or spoken of at the step, before anything
moves.

Noted on the recordings while the backward ran, of every recording; judged here, where all ranks raise alike.
"""

from __future__ import annotations

import warnings

from sophia.checks import SophiaWarning
from sophia.refresh.recorder import Recording

__all__ = ["Misread"]


class Misread:
    """Remembers what has been said."""

    def __init__(self) -> None:
        self.begun = False
        """Whether h has been renewed once: from then on a loss that changes its kind ends no training."""
        self._said: set[tuple[str, str]] = set()

    def check(self, recordings: list[Recording], model: str) -> None:
        """Raise RuntimeError for the first problem that makes h nonsense, or warn, once for each kind.

        Raised only before h was first renewed; later such a loss is warned of, too.
        """
        found = [
            (part, problem)
            for recording in recordings
            for part in recording.outputs
            for problem in part.problems
        ]
        found.sort(key=lambda pair: not pair[1].nonsense)  # stable: the gravest first
        for part, problem in found:
            head = part.head.name
            where = f"the output of {model}" + ("" if head == "logits" else f" ({head!r})")
            text = f"the gradient of your loss in {where} is not that of a {problem.of}: "
            if problem.nonsense and not self.begun:
                raise RuntimeError(
                    f"{text}{problem.cause}. h would have nothing to do with your loss. {problem.instead}"
                )
            key = (head, problem.name)
            if key not in self._said:
                self._said.add(key)
                meanwhile = " Until then h is made as if it were that of a mean" if part.unread else ""
                warnings.warn(f"{text}{problem.cause}. {problem.instead}.{meanwhile}", SophiaWarning)
