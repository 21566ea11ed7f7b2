"""Trackers of the package: TensorBoard, W&B, trackio. Each imports what it needs when it is made, and none
talks to a network unless the user's environment tells it to.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

from sophia.lab.training.trackers import Tracked

__all__ = ["Tensorboard", "Trackio", "Wandb"]

PROJECT = "sophia"
"""Where W&B and trackio file the runs; ``WANDB_PROJECT`` goes before it."""


class Tensorboard:
    """Event files in ``tensorboard/RUN`` of the group's folder."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events that an earlier run of the same configuration left, whose records were deleted, are hidden.
        purge = None if run.resumed else 0
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard" / run.name), purge_step=purge)
        if not run.resumed:
            self._writer.add_text("config", _block(run.config), 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # rows are seldom, and one that a kill loses is not sent again

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The result as text."""
        if result is not None:
            self._writer.add_text("result", _block(result), int(result["steps"]))
        self._writer.close()


class Wandb:
    """A run of W&B: offline, in ``wandb`` of the group's folder, unless ``WANDB_MODE`` and ``WANDB_DIR`` say
    otherwise.

    A run that goes on offline leaves a second folder with the same id; ``wandb sync`` of both makes one run.
    """

    def __init__(self, run: Tracked) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run.group,
            name=run.name,
            id=run.id,
            config=dict(run.config),
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            mode=mode,
            resume="allow" if run.resumed and mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A row of the history; training and evaluation of one step share it."""
        self._run.log(dict(numbers), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The result as summary."""
        if result is not None:
            self._run.summary.update({f"result/{key}": value for key, value in result.items()})
        self._run.finish(exit_code=0 if result is not None else 1)


class Trackio:
    """A run in trackio's own folder, which its dashboard reads; ``TRACKIO_DIR`` moves it."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        self._finish = trackio.finish  # of the run of this process, so that nothing is left for its end
        with contextlib.redirect_stdout(io.StringIO()):  # it greets, and the terminal shows the run
            self._run = trackio.init(
                project=PROJECT,
                name=run.name,
                group=run.group,
                config=dict(run.config),
                resume="allow" if run.resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A row; training and evaluation of one step are two."""
        self._run.log(dict(numbers), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Wait until everything is written; trackio has no place for a result but its rows."""
        if result is not None:
            ends = {f"result/{k}": v for k, v in result.items() if isinstance(v, int | float)}
            self._run.log(ends, step=int(result["steps"]))
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


def _block(values: Mapping[str, Any]) -> str:
    """As a block of code, which TensorBoard shows as it is."""
    return "\n".join("    " + line for line in json.dumps(values, indent=1).splitlines())
