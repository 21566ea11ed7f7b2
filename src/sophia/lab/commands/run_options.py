"""Options that `compare`, `sweep` and `train` share: the protocol and its text, the device, how to begin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sophia.lab.config.field_types import Device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sophia.lab.protocols.protocol import Protocol

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """Common options of commands that train. A subclass adds its own."""

    preset: str | None = None
    """Protocol of the package: first, quick, tiny, small or million; first unless given."""
    protocol: Path | None = None
    """Protocol of your own, a TOML file; or the protocol.json of a record."""
    data: str | None = None
    """Text: sotu (messages of US presidents), stdlib (source of Python's library), or the path of a file or
    folder; the protocol's unless given.
    """
    resume: bool = False
    """Refuse to begin anew; what was begun before goes on with or without this."""
    device: Device = "cpu"
    """cpu or cuda."""
    tracker: tuple[str, ...] = ()
    """Where the curves go as well: tensorboard, wandb (offline unless WANDB_MODE says otherwise), trackio, or
    module:Class of your own. May be repeated.
    """
    forecast: bool = False
    """Only say how long it will take and how much disk, from a few steps of each contender; write nothing."""

    def choose(self, contenders: Sequence[str]) -> Protocol:
        """The protocol with these contenders, or with its own if there are none."""
        from sophia.lab.protocols.protocol_file import chosen

        protocol = chosen(self.preset, self.protocol)
        if contenders:
            protocol = protocol.with_contenders(contenders)
        return protocol if self.data is None else replace(protocol, data=self.data)
