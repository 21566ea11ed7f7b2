"""A block within which nothing can connect."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

__all__ = ["no_network"]


@contextmanager
def no_network() -> Iterator[list[Any]]:
    """Within the block nothing can connect; what was tried is in the list."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> NoReturn:
        tried.append(address)
        raise OSError(f"no network in this experiment, but {address} was asked for")

    before = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[assignment, method-assign]
    try:
        yield tried
    finally:
        socket.socket.connect = before  # type: ignore[method-assign]
