"""Rules that need no curvature: the second moments of its own gradients that a parameter keeps for them.

Equations in ``update_rule.py``. All that is kept starts at zero and lies in the state of the parameter.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from sophia.step.polar import polar_of
from sophia.update_rule import (
    average_second_moment,
    eigenbasis,
    factored_direction,
    inverse_power,
    look_ahead,
    short_side_first,
    whitened_direction,
)

__all__ = ["Factored", "Moment", "SecondMoments", "Whitened"]


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

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """What is kept for a parameter of this shape, by its name in the state."""

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        """Renew what is kept, in place, and return the direction of the step. ``kept["steps"]`` counts this
        one: the parameter's own steps, as one that is unfrozen late begins late.
        """


@dataclass(frozen=True)
class Whitened:
    """For hidden matrices: the short side's second moment and its eigenvectors; of the long side nothing."""

    power: float

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return _of_short_side(shape)

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        return whitened_direction(
            look_ahead(seen.m, seen.g, beta1=seen.beta1),
            _root(kept, seen, self.power),
            power=self.power,
            damping=seen.damping,
            polar_of=polar_of,
        )


@dataclass(frozen=True)
class Factored:
    """For other matrices: the short side's second moment and its eigenvectors, and the long side's mean
    squares; the second moment of every entry of what is no matrix.
    """

    power: float

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if len(shape) != 2:
            return {"steps": (), "exp_avg_sq": tuple(shape)}
        return {**_of_short_side(shape), "mean_squares": (max(shape),)}

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        steps, whole = int(kept["steps"]), "exp_avg_sq" in kept
        m = seen.m / (1 - seen.beta1**steps)
        v = kept["exp_avg_sq" if whole else "mean_squares"]
        squares = seen.g.square() if whole else short_side_first(seen.g).square().mean(0)
        v.lerp_(squares.to(v.dtype), 1 - seen.beta2)
        corrected = (v / (1 - seen.beta2**steps)).to(m.dtype)
        if whole:
            return m / (corrected.sqrt() + seen.eps)
        return factored_direction(m, _root(kept, seen, self.power), corrected, eps=seen.eps)


def _of_short_side(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    square = (min(shape), min(shape))
    return {"steps": (), "second_moment": square, "basis": square}


def _root(kept: MutableMapping[str, Tensor], seen: Moment, power: float) -> Tensor:
    moment, basis = kept["second_moment"], kept["basis"]
    moment.copy_(average_second_moment(moment, seen.g.to(moment.dtype), beta2=seen.beta2))
    if (int(kept["steps"]) - 1) % seen.every == 0:
        basis.copy_(eigenbasis(moment))
    # The eigenvalues are this step's, at 2 n^3: they move faster than the eigenvectors, above all at first.
    return inverse_power(moment, basis, power=power, damping=seen.damping).to(seen.m.dtype)
