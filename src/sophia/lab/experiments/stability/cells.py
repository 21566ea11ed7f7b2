"""What the rows of ``stability`` say of each contender: gains by rate, and the largest rate that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log2
from statistics import fmean
from typing import Any

from sophia.lab.experiments.framework.mean_interval import mean_interval
from sophia.lab.experiments.framework.records import Records

__all__ = ["CLAIMED", "Cell", "cells", "clipped", "gains_by_rate", "largest_stable"]

CLAIMED = ("adamw", "lion", "sophia-g")
"""Those of whom the claim speaks; the damped rule is shown beside them."""


def gains_by_rate(records: Records, **case: Any) -> dict[float, float]:
    """Gain over single bytes by learning rate, nats a byte."""
    return {
        row.case["lr"]: -inf if row.result["loss"] is None else row.result["unigram"] - row.result["loss"]
        for row in records.where(part="trick", **case)
    }


def largest_stable(gains: Mapping[float, float], best: float) -> float | None:
    """The largest learning rate that gains at least half of ``best``; None if none does.

    >>> largest_stable({0.001: 0.1, 0.002: 0.5, 0.004: 0.3, 0.008: 0.1}, best=0.5)
    0.004
    >>> largest_stable({0.001: 0.05, 0.002: 0.04}, best=0.5) is None
    True
    """
    return max((lr for lr, gain in gains.items() if gain >= best / 2), default=None)


@dataclass(frozen=True)
class Cell:
    """One contender; lists are over the seeds."""

    contender: str
    without: list[float | None]
    """Largest stable learning rates; None where every rate was lost."""
    with_: list[float | None]
    """The same with the attention scaled by layer."""
    lowest: float
    """The smallest learning rate that was tried."""
    highest: float
    """The largest."""
    best_without: list[float]
    """What the best rate gains over single bytes, nats a byte."""
    best_with: list[float]
    """The same with the attention scaled by layer."""

    @property
    def doublings(self) -> list[float]:
        """By how many factors of two the scaling raises the largest stable learning rate, at least, where
        one is lost at every rate.
        """
        pairs = zip(self.with_, self.without, strict=True)
        return [log2((w or self.lowest / 2) / (wo or self.lowest / 2)) for w, wo in pairs]

    @property
    def needs(self) -> bool:
        """Whether the scaling doubles the rate at least, beyond what the seeds explain."""
        mean, low, _ = mean_interval(self.doublings)
        return mean >= 1 and low > 0

    @property
    def learns(self) -> float:
        """Mean gain at the best rate of the better variant."""
        return max(fmean(self.best_without), fmean(self.best_with))


def cells(records: Records) -> list[Cell]:
    """Every contender whose runs are complete."""
    found = []
    seeds = [s for s in records.values("seed") if records.where(part="trick", seed=s)]
    for contender in records.values("contender"):
        rates = sorted({r.case["lr"] for r in records.where(part="trick", contender=contender)})
        stable: dict[bool, list[float | None]] = {False: [], True: []}
        bests: dict[bool, list[float]] = {False: [], True: []}
        for seed in seeds:
            kind = {"contender": contender, "seed": seed}
            ladders = {scaled: gains_by_rate(records, **kind, scaled=scaled) for scaled in (False, True)}
            if not rates or any(len(ladder) < len(rates) for ladder in ladders.values()):
                break
            best = max(max(ladder.values()) for ladder in ladders.values())
            for scaled, ladder in ladders.items():
                # Where nothing is learned with the scaling or without, no rate is kept.
                stable[scaled].append(largest_stable(ladder, best) if best > 0 else None)
                bests[scaled].append(max(ladder.values()))
        else:
            found.append(
                Cell(contender, stable[False], stable[True], rates[0], rates[-1], bests[False], bests[True])
            )
    return found


def clipped(records: Records) -> dict[str, float]:
    """Share of steps whose gradient was clipped, by contender, from ordinary weights."""
    return {
        c: fmean(r.result["gradient_clipped"] for r in rows)
        for c in CLAIMED
        if (rows := records.where(part="clipping", contender=c))
    }
