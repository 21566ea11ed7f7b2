"""Curves over a held-out loss that falls: two optimizers compared where their losses are the same.

At the same number of steps the faster one is at a lower loss, where the curvature of everything is another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from sophia.lab.experiments.framework.records import Records, Row
from sophia.lab.experiments.sharpness.along_a_step import KINDS, kind

__all__ = [
    "BASE",
    "LEVELS",
    "QUANTITIES",
    "Curve",
    "Quantity",
    "compared",
    "curve",
    "expanded",
    "matched",
]

BASE = "adamw"
LEVELS = 5
"""Losses at which two curves are compared, evenly spread over those that both pass."""

Curve = list[tuple[float, float]]
"""(loss, quantity) at the points of a run."""
Quantity = Callable[[Mapping[str, Any], list[int]], float]
"""Of a point of a run; with the places of the hidden matrices among its parts."""


def _of_hidden(point: Mapping[str, Any], hidden: list[int]) -> float:
    return float(point["kinds"][KINDS.index("hidden")] / sum(point["squared"][i] for i in hidden))


QUANTITIES: Mapping[str, Quantity] = {
    "-g'd": lambda p, _: p["gain"],
    "|d|^2": lambda p, _: sum(p["squared"]),
    "d'Hd / |d|^2": lambda p, _: p["hessian"] / sum(p["squared"]),
    "d'Gd / |d|^2": lambda p, _: p["gauss_newton"] / sum(p["squared"]),
    "the same of hidden matrices": _of_hidden,
    "share of d'Hd within tensors": lambda p, _: sum(p["within"]) / p["hessian"],
    "penalty / gain": lambda p, _: p["hessian"] / 2 / p["gain"],
    # (g'd)^2 / 2 d'Gd is what the best length of a step in this direction would gain
    "gain of the best length": lambda p, _: p["gain"] * abs(p["gain"]) / (2 * p["gauss_newton"]),
}
"""What is drawn and compared, by the name that it is shown under."""


def expanded(row: Row) -> list[dict[str, Any]]:
    """The points of a run, without those at which something was not finite."""
    return [p for p in row.result["points"] if None not in [v for v in p.values() if not isinstance(v, list)]]


def curve(records: Records, contender: str, seed: int, quantity: str, *, over: str = "loss") -> Curve:
    """Of one run, over the loss or the "step", from the highest down; empty where there is none."""
    found: Curve = []
    for row in records.where(contender=contender, seed=seed):
        hidden = [i for i, part in enumerate(row.result["parts"]) if kind(part) == "hidden"]
        found += [(p[over], QUANTITIES[quantity](p, hidden)) for p in expanded(row)]
    return sorted(found, reverse=True)


def matched(one: Curve, other: Curve, levels: int = LEVELS) -> list[tuple[float, float, float]]:
    """(loss, one, other) at losses that both pass, by straight lines between points; empty if there are none.

    >>> matched([(8.0, 1.0), (6.0, 3.0)], [(7.0, 10.0), (5.0, 30.0)], levels=3)
    [(6.0, 3.0, 20.0), (6.5, 2.5, 15.0), (7.0, 2.0, 10.0)]
    """
    if not one or not other:
        return []
    low = max(min(c)[0] for c in (one, other))
    high = min(max(c)[0] for c in (one, other))
    if low >= high:
        return []
    at = np.linspace(low, high, levels)
    sides = []
    for c in (one, other):
        losses, values = (np.array(column) for column in zip(*sorted(c), strict=True))
        sides.append(np.interp(at, losses, values).tolist())
    return list(zip(at.tolist(), *sides, strict=True))


def compared(records: Records, contender: str, quantity: str) -> list[tuple[float, float]]:
    """For each seed that both have, the medians of the quantity over matched losses: this one's, ``BASE``'s.
    Not means: a single step into a fold of the loss may have a hundred times the others' curvature, of
    either sign.
    """
    found = []
    for seed in sorted(records.values("seed")):
        pairs = matched(curve(records, contender, seed, quantity), curve(records, BASE, seed, quantity))
        if pairs:
            found.append((median(y for _, y, _ in pairs), median(z for _, _, z in pairs)))
    return found
