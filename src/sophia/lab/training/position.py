"""Position of a run: steps done, sums since the last row of its log, and seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Clock", "Position"]


class Clock:
    """Wall and processor seconds inside its ``with`` blocks, from clocks that are never set back."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self._began = (0.0, 0.0)

    def __enter__(self) -> None:
        self._began = (time.monotonic(), time.process_time())

    def __exit__(self, *error: object) -> None:
        self.seconds += time.monotonic() - self._began[0]
        self.cpu_seconds += time.process_time() - self._began[1]


@dataclass
class Position:
    """Counters of a run: what a checkpoint holds beside the model, the optimizer and the random states."""

    step: int = 0
    """Optimizer steps done."""
    loss_sum: float = 0.0
    """Sum of the training losses since the last row."""
    loss_count: int = 0
    """Steps since the last row."""
    clipped_before: int = 0
    """Steps up to the last row whose gradient was clipped."""
    clipped: int = 0
    """Steps since the last row whose gradient was clipped."""
    clock: Clock = field(default_factory=Clock)

    def advance(self, loss: float, *, clipped: bool) -> None:
        """Count a step."""
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1
        self.clipped += clipped

    def means(self) -> tuple[float, float]:
        """Mean loss and share of clipped gradients since the last row; both begin anew."""
        found = self.loss_sum / self.loss_count, self.clipped / self.loss_count
        self.clipped_before, self.clipped = self.clipped_before + self.clipped, 0
        self.loss_sum, self.loss_count = 0.0, 0
        return found

    @property
    def clipped_share(self) -> float | None:
        """Share of all steps whose gradient was clipped; None before the first."""
        return (self.clipped_before + self.clipped) / self.step if self.step else None

    def to_state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "clipped_before": self.clipped_before,
            "clipped": self.clipped,
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Position:
        """The inverse of ``to_state``. The first checkpoints did not count clipped gradients."""
        return cls(
            step=state["step"],
            loss_sum=state["loss_sum"],
            loss_count=state["loss_count"],
            clipped_before=state.get("clipped_before", 0),
            clipped=state.get("clipped", 0),
            clock=Clock(state["seconds"], state["cpu_seconds"]),
        )
