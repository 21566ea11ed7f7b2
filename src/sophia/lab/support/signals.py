"""SIGINT and SIGTERM as a polite request: the loop looks at it between two steps. A second one ends the
process at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Request", "requests"]


class Request:
    """Whether, and by which signal, the process was asked to stop."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def requests(
    *,
    at_once: Callable[[], None] = lambda: None,
    numbers: Collection[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[Request]:
    """Within the block, signals set the request. ``at_once`` runs before a second one ends the process."""
    request = Request()

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            at_once()
            os._exit(128 + number)
        request.signal = number

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
