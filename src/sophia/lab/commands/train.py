"""Options of `sophia train`; implemented in ``sophia.lab.jobs.train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sophia.lab.commands.run_options import RunOptions

__all__ = ["Train"]


@dataclass(frozen=True)
class Train(RunOptions):
    """Train one model with one contender."""

    contender: str = "sophia-g"
    """Name from the table of contenders or of the protocol, or module:Class."""
    seed: int = 1
    """Decides initialisation, order of the data, and the optimizer's own draws."""
    steps: int | None = None
    """Optimizer steps; the protocol's largest budget unless given."""
    lr: float | None = None
    """Peak learning rate."""
    set: tuple[str, ...] = ()
    """Other settings, SETTING=VALUE."""
    out: Path = Path("runs")
    """Folder in which the run gets a folder of its own, named by its configuration."""

    def run(self, command: str) -> int:
        """Train, and print how it ended."""
        from rich.console import Console

        from sophia.lab.jobs.train import train_one
        from sophia.lab.protocols.plan import parse_settings
        from sophia.lab.protocols.protocol import split_label

        label, _ = split_label(self.contender)
        protocol = self.choose([self.contender])
        lr = [] if self.lr is None else [f"{label}={self.lr}"]
        over = parse_settings(lr, [f"{label}.{pair}" for pair in self.set], protocol.row)
        train_one(
            label,
            protocol=protocol.with_settings(over),
            seed=self.seed,
            steps=self.steps,
            out=self.out,
            resume=self.resume,
            device=self.device,
            trackers=self.tracker,
            forecast=self.forecast,
            command=command,
            console=Console(),
        )
        return 0
