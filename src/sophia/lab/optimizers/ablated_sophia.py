"""Sophia with one part exchanged at a time: what is averaged into h, and what bounds the step.

    u = m / max(gamma c, eps)        c: the pre-conditioner
    step = lr * bound(u)

With c = h and the clip this is Sophia itself, and a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.curvature import Estimate, Estimator, GaussNewtonBartlett, PassContext
from sophia.lab.optimizers.adahessian import Squared
from sophia.lab.optimizers.contender import Contender, Settings
from sophia.lab.optimizers.sophia import DEFAULTS, SPACE, hessian_vector_cost, sampled_cost
from sophia.lab.optimizers.sophia_averages import OnSophiaAverages
from sophia.lab.support.errors import UsageError
from sophia.likelihoods import Categorical

__all__ = ["BOUNDS", "CONTENDER", "PRECONDITIONERS", "Ablated", "build"]

PRECONDITIONERS = ("gnb", "hutchinson", "empirical_fisher", "adahessian", "none")
"""c: h of one of the three estimators (Gauss-Newton-Bartlett with single labels, as in the paper); the root
of averaged squares of Hutchinson's (AdaHessian's, without its corrections for bias, as Sophia has none); or 1
everywhere.
"""

BOUNDS = ("clip", "normalise", "none")
"""Element-wise to [-1, 1]; the whole step scaled to root mean square 1; or nothing."""


class _One(Estimator):
    """Curvature 1 everywhere; costs no pass."""

    def estimate(self, context: PassContext) -> Estimate:
        """Return ones."""
        return Estimate([torch.ones_like(p) for p in context.parameters], context.count)


class Ablated(OnSophiaAverages):
    """Sophia's step with another pre-conditioner or another bound (see the module)."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float,
        preconditioner: str = "gnb",
        bound: str = "clip",
        **passes: Any,
    ) -> None:
        """``passes`` (update_every, fraction, seed) are Sophia's. Raises ``UsageError`` for other words."""
        for name, value, known in (
            ("preconditioner", preconditioner, PRECONDITIONERS),
            ("bound", bound, BOUNDS),
        ):
            if value not in known:
                raise UsageError(f"{name} is {value!r}, which is none. Use one of {', '.join(known)}.")
        self.root, self.bound = preconditioner == "adahessian", bound
        estimator: str | Estimator = preconditioner
        if preconditioner == "gnb":
            estimator = GaussNewtonBartlett(Categorical(pairs=0))
        elif self.root:
            estimator = Squared()
        elif preconditioner == "none":
            estimator, betas = _One(), (betas[0], 0.0)  # 1 from the first step on
        super().__init__(
            model,
            estimator=estimator,
            betas=betas,
            weight_decay=weight_decay,
            defaults={"lr": lr, "gamma": gamma, "eps": eps},
            gamma=gamma,
            eps=eps,
            **passes,
        )

    def stats(self) -> dict[str, float]:
        """Those of the Sophia inside, where its clip is this one's."""
        return self.averages.stats() if self.bound == "clip" and not self.root else {}

    def _directions(self, moves: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Iterator[Tensor]:
        steps = []
        for m, h, group in moves:
            c = h.clamp(min=0).sqrt() if self.root else h
            steps.append(m / (group["gamma"] * c).clamp(min=group["eps"]))
        if self.bound == "clip":
            return (u.clamp_(-1, 1) for u in steps)
        if self.bound == "none":
            return iter(steps)
        squares = sum(float(u.double().square().sum()) for u in steps)
        size = sqrt(squares / sum(u.numel() for u in steps))
        return (u / size if size else u for u in steps)


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Sophia with the pre-conditioner and the bound that the settings name."""
    return Ablated(
        model,
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        gamma=float(s["gamma"]),
        eps=float(s["eps"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        fraction=float(s["fraction"]),
        preconditioner=str(s["preconditioner"]),
        bound=str(s["bound"]),
        seed=seed,
    )


def _cost(s: Settings) -> float:
    """That of the estimator; a pre-conditioner of ones needs no pass."""
    if s["preconditioner"] == "none":
        return 0.0
    sampled = s["preconditioner"] in ("gnb", "empirical_fisher")
    return sampled_cost(s) if sampled else hessian_vector_cost(s)


CONTENDER = Contender(
    name="ablated",
    title="Sophia with another pre-conditioner or another bound of the step, for ablations",
    build=build,
    defaults={**DEFAULTS, "preconditioner": "gnb", "bound": "clip"},
    space=SPACE,
    state_per_parameter=8,
    gradients=_cost,
    parts=("gnb_single", "hutchinson", "empirical_fisher"),  # labels are drawn singly here
)
