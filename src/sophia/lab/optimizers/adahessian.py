"""AdaHessian's step on Sophia's averages. Yao et al., arXiv 2006.00719."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.curvature import Estimate, Estimator, Hutchinson, PassContext
from sophia.lab.config.search_space import Choice
from sophia.lab.optimizers import adamw
from sophia.lab.optimizers.contender import Contender, Settings
from sophia.lab.optimizers.sophia import hessian_vector_cost
from sophia.lab.optimizers.sophia_averages import OnSophiaAverages

__all__ = ["CONTENDER", "AdaHessianStep", "Squared", "build"]


class Squared(Estimator):
    """The square of Hutchinson's estimate, whose average is AdaHessian's second moment."""

    differentiates_twice = True

    def __init__(self) -> None:
        self._inner = Hutchinson()

    def estimate(self, context: PassContext) -> Estimate:
        """Return ``(u * (H u))^2``."""
        found = self._inner.estimate(context)
        return Estimate([None if d is None else d.square() for d in found.diagonal], found.count)


class AdaHessianStep(OnSophiaAverages):
    """Step m / (sqrt(v) + eps), v the average of squared Hutchinson estimates, both corrected for their bias.
    No clip.

    The step of AdaHessian (Yao et al., arXiv 2006.00719) without its averaging over blocks of coordinates,
    and with an estimate every k steps.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        **passes: Any,
    ) -> None:
        """``passes`` (update_every, fraction, seed) are Sophia's."""
        own = {"lr": lr, "eps": eps}
        super().__init__(
            model, estimator=Squared(), betas=betas, weight_decay=weight_decay, defaults=own, **passes
        )

    def _directions(self, moves: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Iterator[Tensor]:
        books = self.averages.param_groups[0]
        beta1, beta2 = books["betas"]
        m_share = 1 - beta1 ** books["step"]
        v_share = 1 - beta2 ** books["refreshes"]
        for m, v, group in moves:
            yield (m / m_share).div_((v / v_share).sqrt_().add_(group["eps"]))


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """AdaHessian's step."""
    return AdaHessianStep(
        model,
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        eps=float(s["eps"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        fraction=float(s["fraction"]),
        seed=seed,
    )


CONTENDER = Contender(
    name="adahessian",
    title="AdaHessian's step (arXiv 2006.00719): the root of averaged squares, no clip",
    build=build,
    defaults={
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "update_every": 10,
        "fraction": 0.5,
    },
    space={**adamw.SPACE, "update_every": Choice((1, 5, 10))},
    state_per_parameter=8,
    gradients=hessian_vector_cost,
    parts=("hutchinson",),
)
