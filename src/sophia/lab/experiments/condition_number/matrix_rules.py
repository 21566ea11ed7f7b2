"""Rules for matrices on a ``kronecker`` valley, all settings and starts side by side.

A rule for matrices must see each start of each setting as a matrix of its own: a hundred parameters of 96
numbers, on which the class would spend its time between kernels. So the pure functions of the rules are
mapped over all of them, with the defaults of the class (tests/lab/experiments/test_condition_number.py holds
them to it), without a scale for the kind of tensor.

None of them knows curvature. What they divide by are second moments of gradients: far from the minimum those
of H (theta - theta*), near it those of the noise, which here has H as its covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sophia.lab.experiments.condition_number.convex_problems import Valley
from sophia.lab.experiments.condition_number.descents import METHODS as OF_VECTORS
from sophia.lab.experiments.condition_number.descents import Build, Methods, Settings, Update, rates
from sophia.step.rules import FACTORED, SPECTRAL, WHITENED
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

__all__ = ["METHODS", "SHAPE"]

SHAPE = (8, 12)
"""Of W. The short side has a basis; of the long one a rule for matrices knows the diagonal alone."""
BETA1 = 0.9
"""Of Muon; the others have their rule's."""


def _each(points: Tensor) -> Tensor:
    return points.reshape(-1, *SHAPE)


def _move(points: Tensor, settings: Sequence[Settings], direction: Tensor) -> None:
    lr = torch.tensor([s["lr"] for s in settings], dtype=points.dtype)[:, None, None]
    points.sub_(lr * direction.flatten(1).view_as(points))


def _of_momentum(direction: Callable[[Tensor], Tensor], beta1: float) -> Build:
    """A rule whose direction is that of the look-ahead momentum alone."""

    def build(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
        m = torch.zeros_like(_each(points))
        of_each = torch.vmap(direction)

        def update(noise: Tensor, step: int) -> None:
            g = _each(valley.gradient(points) + noise)
            m.lerp_(g, 1 - beta1)
            _move(points, settings, of_each(look_ahead(m, g, beta1=beta1)))

        return update

    return build


def _whitened(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
    beta1, beta2 = WHITENED.betas
    power = 1 / 8
    m = torch.zeros_like(_each(points))
    moment, basis = torch.zeros(2, len(m), min(SHAPE), min(SHAPE), dtype=points.dtype)

    def of_one(u: Tensor, moment: Tensor, basis: Tensor) -> Tensor:
        root = inverse_power(along(moment, basis), basis, power=power, damping=WHITENED.damping)
        return whitened_direction(u, root, power=power, damping=WHITENED.damping)

    direction = torch.vmap(of_one)

    def update(noise: Tensor, step: int) -> None:
        g = _each(valley.gradient(points) + noise)
        m.lerp_(g, 1 - beta1)
        moment.lerp_(torch.vmap(second_moment)(g), 1 - beta2)
        if step % WHITENED.update_every == 0:
            basis.copy_(eigenbasis(moment))
        _move(points, settings, direction(look_ahead(m, g, beta1=beta1), moment, basis))

    return update


def _factored(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
    beta1, beta2 = FACTORED.betas
    m = torch.zeros_like(_each(points))
    short, long = min(SHAPE), max(SHAPE)
    moment, basis = torch.zeros(2, len(m), short, short, dtype=points.dtype)
    values, r = (torch.zeros(len(m), side, dtype=points.dtype) for side in (short, long))

    def of_one(m: Tensor, values: Tensor, basis: Tensor, r: Tensor) -> Tensor:
        root = inverse_power(values, basis, power=1 / 2, damping=FACTORED.damping)
        return factored_direction(m, root, r, eps=FACTORED.eps)

    direction = torch.vmap(of_one)

    def update(noise: Tensor, step: int) -> None:
        g = _each(valley.gradient(points) + noise)
        m.lerp_(g, 1 - beta1)
        now = torch.vmap(second_moment)(g)
        moment.lerp_(now, 1 - beta2)
        if step % FACTORED.update_every == 0:
            basis.copy_(eigenbasis(moment))
        values.lerp_(torch.vmap(along)(now, basis), 1 - beta2)
        r.lerp_(torch.vmap(lambda g: short_side_first(g).square().mean(0))(g), 1 - beta2)
        started = [1 - beta ** (step + 1) for beta in (beta1, beta2)]
        _move(points, settings, direction(m / started[0], values, basis, r / started[1]))

    return update


_STEPS = [{"lr": r} for r in rates(-5, 0, 26)]
_BUILDS: dict[str, Build] = {
    "Muon": _of_momentum(lambda u: spectral_direction(u, power=0.0), BETA1),
    "spectral": _of_momentum(lambda u: spectral_direction(u, power=1 / 4), SPECTRAL.betas[0]),
    "whitened": _whitened,
    "factored": _factored,
}
METHODS: Methods = {
    "AdamW": (OF_VECTORS["AdamW"][0], _STEPS),
    "Sophia, Rademacher": (
        OF_VECTORS["Sophia, Rademacher"][0],
        [{"lr": r, "rate": share} for r in rates(-3, 0, 16) for share in (0.003, 0.03, 0.3)],
    ),
    **{name: (build, _STEPS) for name, build in _BUILDS.items()},
}
"""Two of ``descents``, which do not look at the shape, Muon's step, and our rules for matrices."""
