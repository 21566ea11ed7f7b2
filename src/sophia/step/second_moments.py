"""Rules that need no curvature: the second moments of its own gradients that a parameter keeps for them.

Equations in ``update_rule.py``. All that is kept starts at zero and lies in the state of the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from sophia.step.polar import polar_of
from sophia.update_rule import (
    average_second_moment,
    eigenbasis,
    inverse_power,
    look_ahead,
    rotated_direction,
    short_side_first,
    whitened_direction,
)

__all__ = ["KroneckerFactor", "Moment", "RotatedSecondMoment", "SecondMoments"]


class Moment(NamedTuple):
    """What a step has of a parameter, and the numbers of its group."""

    g: Tensor
    m: Tensor
    """Of which g is part already."""
    beta1: float
    beta2: float
    step: int
    """From 1."""
    renews: bool
    """Whether the decompositions are due."""
    damping: float
    eps: float


class SecondMoments(Protocol):
    """Second moments of a parameter's gradients, and the direction that they give."""

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """What is kept for a parameter of this shape, by its name in the state."""

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        """Renew what is kept, in place, and return the direction of the step."""


@dataclass(frozen=True)
class KroneckerFactor:
    """``whitened``: of the short side all second moments, of the long side the diagonal of this step's."""

    power: float

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        short = min(shape)
        return {"second_moment": (short, short), "root": (short, short)}

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        moment = kept["second_moment"]
        moment.copy_(average_second_moment(moment, seen.g.to(moment.dtype), beta2=seen.beta2))
        if seen.renews:
            kept["root"].copy_(inverse_power(moment, power=self.power, damping=seen.damping))
        return whitened_direction(
            look_ahead(seen.m, seen.g, beta1=seen.beta1),
            kept["root"].to(seen.m.dtype),
            power=self.power,
            damping=seen.damping,
            polar_of=polar_of,
        )


@dataclass(frozen=True)
class RotatedSecondMoment:
    """``rotated``: Adam in the eigenbasis of the short side; of what is no matrix, Adam."""

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        whole = {"exp_avg_sq": tuple(shape)}
        if len(shape) != 2:
            return whole
        short = min(shape)
        return {**whole, "second_moment": (short, short), "basis": (short, short)}

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        v, m = kept["exp_avg_sq"], seen.m / (1 - seen.beta1**seen.step)
        basis = self._basis(kept, seen) if "basis" in kept else None
        g = seen.g if basis is None else _rotated(seen.g, basis)
        v.lerp_(g.square().to(v.dtype), 1 - seen.beta2)
        corrected = (v / (1 - seen.beta2**seen.step)).to(m.dtype)
        if basis is None:
            return m / (corrected.sqrt() + seen.eps)
        return rotated_direction(m, corrected, basis, eps=seen.eps)

    def _basis(self, kept: Mapping[str, Tensor], seen: Moment) -> Tensor:
        moment = kept["second_moment"]
        moment.copy_(average_second_moment(moment, seen.g.to(moment.dtype), beta2=seen.beta2))
        if seen.renews:
            kept["basis"].copy_(eigenbasis(moment))
        return kept["basis"].to(seen.m.dtype)


def _rotated(g: Tensor, basis: Tensor) -> Tensor:
    x = short_side_first(g)
    turned = basis.T @ x
    return turned if x is g else turned.T
