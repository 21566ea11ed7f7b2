"""Options of `sophia sweep`; implemented in ``sophia.lab.jobs.sweep``."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from sophia.lab.commands.run_options import RunOptions

__all__ = ["Sweep"]


@dataclass(frozen=True)
class Sweep(RunOptions):
    """Look for the settings of each contender with an equal number of trials, and write the tuned protocol.

    Trials are spread evenly over the declared spaces first, then proposed by TPE; none is cut short.
    """

    contenders: Positional[tuple[str, ...]] = ()
    """As for compare; the protocol's unless given. The baseline always has its trials too."""
    trials: int | None = None
    """Trials for each contender; the protocol's unless given."""
    out: Path | None = None
    """Folder of the records; sweeps/... unless given."""
    workers: int | None = None
    """Trials at a time; as many as there are cores unless given."""

    def run(self, command: str) -> int:
        """Do the trials, and print the winners."""
        from rich.console import Console

        from sophia.lab.support.errors import LabError

        if importlib.util.find_spec("optuna") is None:
            raise LabError(
                "A sweep needs the package 'optuna', which is not installed. "
                "Write: pip install 'torch-sophia[lab,sweep]'"
            )
        from sophia.lab.jobs.sweep import sweep

        protocol = self.choose(self.contenders)
        if self.trials is not None:
            protocol = replace(protocol, search=replace(protocol.search, trials=self.trials))
        sweep(
            protocol,
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
