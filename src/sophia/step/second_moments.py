"""Rules that need no curvature: the second moments of its own gradients that a parameter keeps for them, or
that its momentum has.

Equations in ``update_rule.py``. All that is kept starts at zero and lies in the state of the parameter.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sophia.step.polar import polar_of
from sophia.update_rule import (
    along,
    eigenbasis,
    factored_direction,
    inverse_power,
    look_ahead,
    second_moment,
    short_side_first,
    spectral_direction,
    whitened_direction,
)

__all__ = ["Equilibrated", "Factored", "Moment", "SecondMoments", "Whitened"]


class Moment(NamedTuple):
    """What a step has of a parameter, and the numbers of its group."""

    g: Tensor
    m: Tensor
    """Of which g is part already."""
    beta1: float
    beta2: float
    every: int
    """Steps between two decompositions."""
    damping: float
    eps: float


class SecondMoments(Protocol):
    """Second moments of a parameter's gradients, and the direction that they give."""

    @property
    def decomposes(self) -> bool:
        """Whether eigenvectors are renewed every few steps, which no graph may capture."""

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """What is kept for a parameter of this shape, by its name in the state."""

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        """Renew what is kept, in place, and return the direction of the step."""


@dataclass(frozen=True)
class Equilibrated:
    """For hidden matrices: nothing but this step's momentum, whose rows and columns are scaled alike."""

    power: float
    decomposes = False

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {}

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        u = look_ahead(seen.m, seen.g, beta1=seen.beta1)
        # A graph through the step takes the plain way.
        fast = None if torch.is_grad_enabled() else polar_of
        return spectral_direction(u, power=self.power, polar_of=fast)


@dataclass(frozen=True)
class Whitened:
    """For hidden matrices: the short side's second moment and its eigenvectors; of the long side nothing."""

    power: float
    decomposes = True

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return _of_short_side(shape)

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        _renew(kept, seen, _counted(kept))
        # The values are this step's, at 2 n^3: they move faster than the eigenvectors, above all at first.
        values, basis = along(kept["second_moment"], kept["basis"]), kept["basis"]
        root = inverse_power(values, basis, power=self.power, damping=seen.damping)
        return whitened_direction(
            look_ahead(seen.m, seen.g, beta1=seen.beta1),
            root.to(seen.m.dtype),
            power=self.power,
            damping=seen.damping,
            polar_of=polar_of,
        )


@dataclass(frozen=True)
class Factored:
    """For other matrices: the short side's second moment, its eigenvectors and the mean squares along them,
    and the long side's mean squares; the second moment of every entry of what is no matrix.
    """

    power: float
    decomposes = True

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if len(shape) != 2:
            return {"steps": (), "exp_avg_sq": tuple(shape)}
        return {
            **_of_short_side(shape),
            "basis_squares": (min(shape),),
            "mean_squares": (max(shape),),
        }

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        steps = _counted(kept)
        started, m, of_m = 1 - seen.beta2**steps, seen.m, 1 - seen.beta1**steps
        if "exp_avg_sq" in kept:
            v = _averaged(kept["exp_avg_sq"], seen.g.square(), seen)
            return m / of_m / ((v / started).to(m.dtype).sqrt() + seen.eps)
        now = _renew(kept, seen, steps)
        # Of each step in the basis of its time, which knows that step's gradient hardly better than others.
        values = _averaged(kept["basis_squares"], along(now, kept["basis"]), seen)
        # Where no gradient ever is, as along the sum of a head's rows, m is its rounding alone.
        damping = max(seen.damping, (2 * torch.finfo(kept["exp_avg"].dtype).eps) ** 2)
        root = inverse_power(values, kept["basis"], power=self.power, damping=damping)
        r = _averaged(kept["mean_squares"], short_side_first(seen.g).square().mean(0), seen) / started
        # The correction of m in the small matrix, not in all of m.
        return factored_direction(m, (root / of_m).to(m.dtype), r.to(m.dtype), eps=seen.eps)


def _of_short_side(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    square = (min(shape), min(shape))
    return {"steps": (), "second_moment": square, "basis": square}


def _counted(kept: MutableMapping[str, Tensor]) -> int:
    """The parameter's own steps, with this one: one that is unfrozen late begins late."""
    kept["steps"] += 1
    return int(kept["steps"])


def _renew(kept: MutableMapping[str, Tensor], seen: Moment, steps: int) -> Tensor:
    """Average the short side's second moment, and decompose it where that is due; return this step's."""
    moment = kept["second_moment"]
    now = second_moment(seen.g.to(moment.dtype))
    _averaged(moment, now, seen)
    if (steps - 1) % seen.every == 0:
        kept["basis"].copy_(eigenbasis(moment))
    return now


def _averaged(average: Tensor, now: Tensor, seen: Moment) -> Tensor:
    return average.lerp_(now.to(average.dtype), 1 - seen.beta2)
