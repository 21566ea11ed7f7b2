"""Options of `sophia compare`; implemented in ``sophia.lab.jobs.compare``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from sophia.lab.commands.run_options import RunOptions

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare(RunOptions):
    """Compare optimizers for language-model pre-training, with a verdict and a report.

    Without arguments: AdamW against Sophia-G on the built-in corpus, a few minutes on two cores.
    """

    contenders: Positional[tuple[str, ...]] = ()
    """Names from the table of contenders or of the protocol, or an optimizer of your own as module:Class or
    label=module:Class; the baseline is added if it is left out. The protocol's unless given.
    """
    seeds: int | None = None
    """Number of seeds; the protocol's unless given."""
    lr: tuple[str, ...] = ()
    """Peak learning rates, NAME=VALUE, for instance adamw=2e-3,sophia-g=7e-4. May be repeated."""
    set: tuple[str, ...] = ()
    """Other settings, NAME.SETTING=VALUE, for instance sophia-g.gamma=0.1. May be repeated."""
    budgets: tuple[int, ...] = ()
    """Steps of the runs; the protocol's unless given."""
    out: Path | None = None
    """Folder of the records and the report; comparisons/... unless given."""
    workers: int | None = None
    """Runs at a time; as many as there are cores unless given. With 1, seconds are measured without a
    neighbour.
    """

    def run(self, command: str) -> int:
        """Compare, and print the verdict."""
        from rich.console import Console

        from sophia.lab.jobs.compare import compare
        from sophia.lab.protocols.plan import parse_settings
        from sophia.lab.support.errors import UsageError

        protocol = self.choose(self.contenders)
        if self.seeds is not None:
            if self.seeds < 1:
                raise UsageError(
                    f"--seeds is {self.seeds}, and a comparison without a run compares nothing. "
                    "Use 2 or more."
                )
            protocol = replace(protocol, seeds=tuple(range(1, self.seeds + 1)))
        if self.budgets:
            protocol = replace(protocol, budgets=tuple(sorted(set(self.budgets))))
        compare(
            protocol.with_settings(parse_settings(self.lr, self.set, protocol.row)),
            out=self.out,
            resume=self.resume,
            workers=self.workers,
            device=self.device,
            trackers=self.tracker,
            forecast=self.forecast,
            command=command,
            console=Console(),
        )
        return 0
