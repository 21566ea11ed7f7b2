"""Descents on a ``Valley``, many settings side by side, until the best of them has arrived.

The theorem's method is written out here: it has the full Hessian. AdamW is torch's. Sophia is the class that
users get, with the estimator that they get; each setting is a parameter group of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia import Sophia
from sophia.curvature import Hutchinson
from sophia.lab.experiments.condition_number.convex_problems import Valley
from sophia.lab.experiments.framework.progress import Progress

__all__ = [
    "METHODS",
    "Arrival",
    "Build",
    "Methods",
    "Settings",
    "Update",
    "clipped_newton",
    "losses_by_dimension",
    "race",
    "rates",
    "sign_descent_at_worst",
    "signs_bound",
]

PATIENCE = 50
"""So many steps in a row all starts must be below the target: an oscillation that passes it does not count.
"""


def clipped_newton(
    valley: Valley, theta: Tensor, *, radius: float, target: float, limit: int
) -> list[int | None]:
    """Steps to a loss of ``target`` from each start (n, d), by the method of Theorem 4.3.

    theta <- theta - eta V^T clip(V H^-1 g, rho),   H = V^T S V,   eta = 1/2,   rho = R / (2 sqrt d)
    """
    rho = radius / (2 * theta.shape[-1] ** 0.5)
    arrived: list[int | None] = [None] * len(theta)
    for step in range(limit + 1):
        for i in (valley.loss(theta) <= target).nonzero().flatten().tolist():
            arrived[i] = step if arrived[i] is None else arrived[i]
        if None not in arrived:
            break
        values, vectors = torch.linalg.eigh(valley.hessian(theta))
        along = (vectors.mT @ valley.gradient(theta)[..., None])[..., 0]
        move = (along / values).clamp(-rho, rho)
        theta = theta - 0.5 * (vectors @ move[..., None])[..., 0]
    return arrived


def sign_descent_at_worst(kappa: float, *, gap: float, target: float, rates: int) -> int:
    """Steps of SignGD with its best constant step on ``x^2/2 + kappa y^2/2``, from the worse of two starts.

    One has all of the gap on the flat axis. The other lies at y = step/2, where the sharp coordinate
    oscillates for ever, and has the rest of the gap on the flat axis.
    """
    largest = (8 * target / kappa) ** 0.5  # above it the oscillation alone is more than the target
    step = largest * torch.linspace(1.5, 0.5, rates, dtype=torch.float64)
    y = torch.stack([torch.zeros_like(step), step / 2])
    x = (2 * gap - kappa * y**2).clamp(min=0).sqrt()
    first = torch.full_like(x, torch.inf)
    for count in range(20 * int((kappa * gap / target) ** 0.5 + 2)):
        below = (x**2 + kappa * y**2) / 2 <= target
        first = torch.where(below & first.isinf(), float(count), first)
        if first.amax(0).isfinite().any():
            break
        x, y = x - step * x.sign(), y - step * y.sign()
    return int(first.amax(0).amin())


def signs_bound(kappa: float, *, gap: float, target: float) -> float:
    """What SignGD cannot beat there: ``(sqrt(gap / target) - 1) sqrt(kappa) / 2``.

    The sharp coordinate allows a step of sqrt(8 target / kappa) at most, and with it the flat one has to come
    from sqrt(2 gap) to sqrt(2 target).
    """
    return 0.5 * (math.sqrt(gap / target) - 1) * math.sqrt(kappa)


@dataclass(frozen=True)
class Arrival:
    """The best setting of a method, the first with which all starts arrived."""

    steps: int | None
    """After which all starts stayed below the target; None if no setting got there within the limit."""
    settings: dict[str, float] | None


Settings = Mapping[str, float]
Update = Callable[[Tensor, int], None]
"""``update(noise, step)``: gradients with this noise (starts, d), then one step of every setting."""
Build = Callable[[Valley, Tensor, Sequence[Settings]], Update]
"""(valley, points (settings, starts, d), settings) -> how the points are moved, in place."""
Methods = Mapping[str, tuple[Build, Sequence[Settings]]]
"""How each method is built, and the settings among which its best is taken."""


def race(
    method: str,
    valley: Valley,
    starts: Tensor,
    *,
    target: float,
    limit: int,
    predictions: int,
    seed: int,
    grid: Sequence[Settings] | None = None,
    methods: Methods | None = None,
    progress: Progress | None = None,
) -> Arrival:
    """Run every setting of a method from all starts (n, d) on the same noisy gradients, until the first has
    arrived. None: of ``METHODS``.
    """
    build, default = (METHODS if methods is None else methods)[method]
    settings = list(default if grid is None else grid)
    points = starts.repeat(len(settings), 1, 1)
    update = build(valley, points, settings)
    generator = torch.Generator().manual_seed(seed)
    streak = torch.zeros(len(settings), dtype=torch.int64)
    for step in range(limit + PATIENCE):
        below = (valley.loss(points) <= target).all(-1)
        streak = torch.where(below, streak + 1, 0)
        if bool((streak >= PATIENCE).any()):
            return Arrival(step + 1 - PATIENCE, dict(settings[int(streak.argmax())]))
        if step % 100 == 0 and progress is not None:
            progress.check()
            progress.within(step / limit)
        update(valley.noise((starts.shape[0],), predictions, generator), step)
    return Arrival(None, None)


def losses_by_dimension(
    method: str,
    valley: Valley,
    starts: Tensor,
    steps: int,
    *,
    predictions: int | None,
    settings: Sequence[Settings],
) -> Tensor:
    """On a quadratic, the loss of each eigendirection along the paths of all settings, in the mean over
    ``starts`` (n, d): (steps + 1, settings, d). None predictions: no noise.
    """
    build, _ = METHODS[method]
    points = starts.repeat(len(settings), 1, 1)
    update = build(valley, points, settings)
    generator = torch.Generator().manual_seed(3)
    quiet = torch.zeros_like(starts)
    found = []
    for step in range(steps + 1):
        found.append((valley.eigenvalues * (points @ valley.basis) ** 2 / 2).mean(1))
        if step < steps:
            noise = quiet if predictions is None else valley.noise((len(starts),), predictions, generator)
            update(noise, step)
    return torch.stack(found)


def _gradient_descent(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
    rate = torch.tensor([s["lr"] for s in settings], dtype=torch.float64)[:, None, None]
    rate = rate / valley.eigenvalues.max()  # in units of what the sharpest direction allows

    def update(noise: Tensor, step: int) -> None:
        points.sub_(rate * (valley.gradient(points) + noise))

    return update


def _sign_descent(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
    rate = torch.tensor([s["lr"] for s in settings], dtype=torch.float64)[:, None, None]

    def update(noise: Tensor, step: int) -> None:
        points.sub_(rate * (valley.gradient(points) + noise).sign())

    return update


def _leaves(points: Tensor) -> list[Tensor]:
    """A parameter for each setting, in the memory of ``points``."""
    return [part.detach().requires_grad_() for part in points.unbind(0)]


def _adamw(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
    leaves = _leaves(points)
    groups = [{"params": [p], "lr": s["lr"]} for p, s in zip(leaves, settings, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def update(noise: Tensor, step: int) -> None:
        for leaf, gradient in zip(leaves, (valley.gradient(points) + noise).unbind(0), strict=True):
            leaf.grad = gradient
        optimizer.step()

    return update


def _sophia(distribution: str) -> Build:
    """The paper's betas and interval. The loss of a pass is the valley's: only the probe makes noise."""

    def build(valley: Valley, points: Tensor, settings: Sequence[Settings]) -> Update:
        leaves = _leaves(points)
        groups = [
            {"params": [p], "lr": s["lr"], "gamma": s["lr"] / s["rate"]}
            for p, s in zip(leaves, settings, strict=True)
        ]
        estimator = Hutchinson(distribution=distribution)
        optimizer = Sophia(groups, mode="manual", estimator=estimator, weight_decay=0.0, seed=1)

        def update(noise: Tensor, step: int) -> None:
            if step % 10 == 0:
                with optimizer.hessian_pass() as hp:
                    hp.add(valley.loss(torch.stack(leaves)).sum(), 1)
            for leaf, gradient in zip(leaves, (valley.gradient(points) + noise).unbind(0), strict=True):
                leaf.grad = gradient
            optimizer.step()

        return update

    return build


def rates(low: float, high: float, number: int) -> list[float]:
    """Step sizes from 10^low to 10^high, evenly spread in the logarithm, to four digits."""
    return [float(f"{r:.4g}") for r in torch.logspace(low, high, number, dtype=torch.float64)]


# rate = lr / gamma, the share of a Newton step that an unclipped coordinate takes
_SOPHIA = [{"lr": r, "rate": share} for r in rates(-3, 0, 19) for share in (0.003, 0.01, 0.03, 0.1, 0.3)]

METHODS: dict[str, tuple[Build, list[dict[str, Any]]]] = {
    "gradient descent": (_gradient_descent, [{"lr": r} for r in (0.5, 1.0, 1.3, 1.6, 1.8, 1.9, 1.97)]),
    "SignGD": (_sign_descent, [{"lr": r} for r in rates(-5, 0, 61)]),
    "AdamW": (_adamw, [{"lr": r} for r in rates(-4, 1, 41)]),
    "Sophia": (_sophia("gaussian"), _SOPHIA),
    "Sophia, Rademacher": (_sophia("rademacher"), _SOPHIA),
}
"""How each method is built, and the settings among which its best is taken. The paper's probe is Gaussian."""
