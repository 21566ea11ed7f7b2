"""The options by which every command chooses its protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sophia.lab.protocols.protocol import Protocol

__all__ = ["ProtocolChoice"]


@dataclass(frozen=True)
class ProtocolChoice:
    """A protocol, and the text it is done on."""

    preset: str | None = None
    """Protocol of the package: quick, tiny, small or million; quick unless given."""
    protocol: Path | None = None
    """Protocol of your own, a TOML file."""
    data: str | None = None
    """Text: sotu (messages of US presidents), stdlib (source of Python's library), or the path of a file or
    folder; the protocol's unless given.
    """

    def choose(self, contenders: Sequence[str]) -> Protocol:
        """The protocol with these contenders, or with its own if there are none."""
        from sophia.lab.protocols.protocol_file import chosen

        protocol = chosen(self.preset, self.protocol)
        if contenders:
            protocol = protocol.with_contenders(contenders)
        return protocol if self.data is None else replace(protocol, data=self.data)
