"""Agreement of the ranks on whether a pass worked."""

from __future__ import annotations

from typing import Any

from sophia.distributed.collectives import Ranks

__all__ = ["Agreement"]


class Agreement:
    """Agreement of the ranks, once in a pass, on whether it worked: before the first sum, or when something
    failed, or at the end if there was neither.
    """

    def __init__(self, ranks: Ranks, mild: type[Exception]) -> None:
        self.ranks, self._mild, self._reached = ranks, mild, False

    def reach(self, error: Exception | None = None) -> None:
        """Agree, once. With an error, nothing comes after it: it is raised, on all ranks where that is
        possible.
        """
        if error is not None and (self._reached or self.ranks.lockstep):
            raise error  # the others are not here: they wait inside a forward, and end when this process does
        if not self._reached:
            self._reached = True
            self.ranks.agree(error, mild=self._mild)

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.reach()
        elif isinstance(error, Exception) and not self._reached:
            self.reach(error)
