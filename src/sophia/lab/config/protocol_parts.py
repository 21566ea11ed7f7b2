"""The sections of a protocol: schedule, evaluation, contenders, search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from sophia.lab.config.field_types import Count, Fraction, ScheduleKind, Seed
from sophia.lab.config.run import Setting
from sophia.lab.config.search_space import Space
from sophia.lab.support.dataclass_json import checked_dataclass

__all__ = ["Entry", "Evaluation", "Schedule", "Search"]


@checked_dataclass(frozen=True)
class Schedule:
    """Learning rate over a run, in fractions of its steps; see ``sophia.lab.config.schedules``."""

    kind: ScheduleKind = "cosine"
    """"cosine" or "wsd" (warm-up, stable, decay)."""
    warmup: Fraction = 0.1
    """Fraction of the steps that warm up. With "wsd" it is a fraction of the smallest budget at every budget:
    runs of several budgets are then equal up to where the shorter begins to decay.
    """
    floor: Fraction = 0.05
    """Last learning rate as a fraction of the peak."""
    decay: Fraction = 0.2
    """Fraction of the steps that decay, for "wsd"."""


@checked_dataclass(frozen=True)
class Evaluation:
    """How the loss on held-out text is measured."""

    times: Count = 8
    """Evaluations of a run after the one at step 0, evenly spaced. With a "wsd" schedule, of the longest run:
    the shorter ones are evaluated at the same steps, and at their end.
    """
    sequences: Count = 512
    """Held-out sequences, the same at every evaluation of every run."""


@checked_dataclass(frozen=True)
class Entry:
    """A contender of this comparison."""

    optimizer: str | None = None
    """``module:Class`` of an optimizer that is not in the table of contenders."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Settings over the contender's defaults."""
    warmup: Fraction | None = None
    """Warm-up of this contender; the schedule's unless given."""


@checked_dataclass(frozen=True)
class Search:
    """How the settings are looked for by `sophia sweep`: the same for every contender."""

    trials: Count = 12
    """For each contender."""
    spread: Count = 8
    """How many of them are spread evenly over the space before TPE proposes the rest."""
    seed: Seed = 100
    """Of the search and of its runs; none of the comparison's."""
    budget: Count | None = None
    """Steps of a trial; the smallest budget of the comparison unless given."""
    spaces: Mapping[str, Space] = field(default_factory=dict)
    """By contender; the contender's own space unless given."""
