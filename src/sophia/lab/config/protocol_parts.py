"""The sections of a protocol: schedule, evaluation, contenders, search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sophia.lab.config.run import Setting
from sophia.lab.config.search_space import Space
from sophia.lab.support.errors import UsageError

__all__ = ["Entry", "Evaluation", "Schedule", "Search"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run, in fractions of its steps; see ``sophia.lab.config.schedules``."""

    kind: str = "cosine"
    """"cosine" or "wsd" (warm-up, stable, decay)."""
    warmup: float = 0.1
    """Fraction of the steps that warm up. With "wsd" it is a fraction of the smallest budget at every budget:
    runs of several budgets are then equal up to where the shorter begins to decay.
    """
    floor: float = 0.05
    """Last learning rate as a fraction of the peak."""
    decay: float = 0.2
    """Fraction of the steps that decay, for "wsd"."""

    def __post_init__(self) -> None:
        _fraction("schedule.warmup", self.warmup)


@dataclass(frozen=True)
class Evaluation:
    """How the loss on held-out text is measured."""

    times: int = 8
    """Evaluations of a run after the one at step 0, evenly spaced. With a "wsd" schedule, of the longest run:
    the shorter ones are evaluated at the same steps, and at their end.
    """
    sequences: int = 512
    """Held-out sequences, the same at every evaluation of every run."""

    def __post_init__(self) -> None:
        _at_least("evaluation.times", self.times, 1)


@dataclass(frozen=True)
class Entry:
    """A contender of this comparison."""

    optimizer: str | None = None
    """``module:Class`` of an optimizer that is not in the table of contenders."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Settings over the contender's defaults."""
    warmup: float | None = None
    """Warm-up of this contender; the schedule's unless given."""

    def __post_init__(self) -> None:
        if self.warmup is not None:
            _fraction("warmup", self.warmup)


@dataclass(frozen=True)
class Search:
    """How the settings are looked for by `sophia sweep`: the same for every contender."""

    trials: int = 12
    """For each contender."""
    spread: int = 8
    """How many of them are spread evenly over the space before TPE proposes the rest."""
    seed: int = 100
    """Of the search and of its runs; none of the comparison's."""
    budget: int | None = None
    """Steps of a trial; the smallest budget of the comparison unless given."""
    spaces: Mapping[str, Space] = field(default_factory=dict)
    """By contender; the contender's own space unless given."""

    def __post_init__(self) -> None:
        _at_least("search.trials", self.trials, 1)
        _at_least("search.spread", self.spread, 1)
        _at_least("search.seed", self.seed, 0)
        if self.budget is not None:
            _at_least("search.budget", self.budget, 1)


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}: it is a fraction of the steps. Use a number from 0 to 1.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name} is {value}: there is nothing to do with less than {least}. Use more.")
