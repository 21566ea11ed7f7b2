"""Rules that need no curvature: the second moments of its own gradients that a parameter keeps for them, or
that its momentum has.

Equations in ``update_rule.py``. All that is kept starts at zero and lies in the state of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
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

Place = EllipsisType | tuple[slice, slice]

_PIECE = 2**18
"""Numbers of a table that are moved at a time: they stay in the cache, and the rest is not copied."""


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

    def pieces(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Iterator[tuple[Place, Tensor]]:
        """The same piece by piece, with the places: of a large table never all is in memory at once."""
        yield ..., self.direction(kept, seen)


@dataclass(frozen=True)
class Equilibrated(SecondMoments):
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
class Whitened(SecondMoments):
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
class Factored(SecondMoments):
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
        if "exp_avg_sq" in kept:
            return self._entry_by_entry(kept, seen)
        root, r = self._factors(kept, seen)
        return factored_direction(seen.m, root, r, eps=seen.eps)

    def pieces(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Iterator[tuple[Place, Tensor]]:
        if "exp_avg_sq" in kept:
            yield ..., self._entry_by_entry(kept, seen)
            return
        root, r = self._factors(kept, seen)
        rows, columns = seen.m.shape
        for part in _parts(len(r), len(root)):
            place = (part, slice(None)) if rows > columns else (slice(None), part)
            yield place, factored_direction(seen.m[place], root, r[part], eps=seen.eps)

    def _entry_by_entry(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        steps, m = _counted(kept), seen.m
        v = _averaged(kept["exp_avg_sq"], seen.g.square(), seen) / (1 - seen.beta2**steps)
        return m / (1 - seen.beta1**steps) / (v.to(m.dtype).sqrt() + seen.eps)

    def _factors(self, kept: MutableMapping[str, Tensor], seen: Moment) -> tuple[Tensor, Tensor]:
        """P and r of ``factored_direction``, both corrected for their start at zero."""
        steps, dtype = _counted(kept), seen.m.dtype
        now = _renew(kept, seen, steps)
        # Of each step in the basis of its time, which knows that step's gradient hardly better than others.
        values = _averaged(kept["basis_squares"], along(now, kept["basis"]), seen)
        # Where no gradient ever is, as along the sum of a head's rows, m is its rounding alone.
        damping = max(seen.damping, (2 * torch.finfo(kept["exp_avg"].dtype).eps) ** 2)
        root = inverse_power(values, kept["basis"], power=self.power, damping=damping)
        r = _averaged(kept["mean_squares"], _mean_squares(short_side_first(seen.g)), seen)
        # The correction of m in the small matrix, not in all of m.
        return (root / (1 - seen.beta1**steps)).to(dtype), (r / (1 - seen.beta2**steps)).to(dtype)


def _mean_squares(x: Tensor) -> Tensor:
    """Over the rows, (columns,)."""
    return torch.cat([x[:, part].square().mean(0) for part in _parts(x.size(1), x.size(0))])


def _parts(long: int, short: int) -> Iterator[slice]:
    """Of the long side, each longer than the short one: a square piece would not tell which side is which."""
    number = max(1, min(long // (short + 1), long * short // _PIECE))
    ends = [long * i // number for i in range(number + 1)]
    return map(slice, ends[:-1], ends[1:])


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
