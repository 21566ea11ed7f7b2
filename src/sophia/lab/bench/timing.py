"""Ratios of time, taken turn about: A B A, so that a machine that slows down slows both.

On a CPU it is the processor time of the process, all threads together, so what other processes do counts
little; on a GPU the time on the clock from one idle moment of the device to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from sophia.lab.bench.methods import Trainer

__all__ = ["Ratio", "Timed", "amortised", "clock_of", "steps_alone", "training_steps"]

Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """A time over the reference's: the median of rounds, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """From the ratios of the rounds.

        >>> Ratio.of([1.0, 1.1, 1.2])
        Ratio(median=1.1, low=1.05, high=1.15)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, round(low, 12), round(high, 12))

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Timed:
    """Whole training steps over the reference's."""

    plain: Ratio
    """Without a refresh."""
    refreshing: Ratio | None
    """With one; None where there is none."""


def clock_of(device: str) -> Clock:
    """The clock for a device, in seconds."""
    if device == "cpu":
        return time.process_time

    def idle() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return idle


def _seconds(work: Callable[[], None], clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start


def training_steps(own: Trainer, reference: Trainer, *, rounds: int, clock: Clock) -> Timed:
    """Time whole steps of ``own`` between steps of ``reference``."""
    for trainer in (own, own, reference):  # what is made once is not what a step costs
        trainer.step()
    plain: list[float] = []
    refreshing: list[float] = []
    before = _seconds(reference.step, clock)
    for _ in range(rounds):
        for found in (refreshing, plain) if own.refreshes else (plain,):
            mine = _seconds(own.step, clock)
            after = _seconds(reference.step, clock)
            found.append(2 * mine / (before + after))
            before = after
    return Timed(Ratio.of(plain), Ratio.of(refreshing) if refreshing else None)


def steps_alone(own: Trainer, reference: Trainer, *, rounds: int, clock: Clock) -> Ratio:
    """Time the optimizers' steps alone."""
    for trainer in (own, reference):
        trainer.ready_for_steps_alone()
        trainer.step_alone()
    ratios = []
    before = _seconds(reference.step_alone, clock)
    for _ in range(rounds):
        mine = _seconds(own.step_alone, clock)
        after = _seconds(reference.step_alone, clock)
        ratios.append(2 * mine / (before + after))
        before = after
    for trainer in (own, reference):
        trainer.optimizer.zero_grad()
    return Ratio.of(ratios)


def amortised(timed: Timed, every: int) -> float:
    """A training step on average over ``every``, of which one refreshes.

    >>> amortised(Timed(Ratio(1.0, 1.0, 1.0), Ratio(1.5, 1.5, 1.5)), 10)
    1.05
    """
    if timed.refreshing is None:
        return timed.plain.median
    return ((every - 1) * timed.plain.median + timed.refreshing.median) / every
