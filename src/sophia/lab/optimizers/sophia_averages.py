"""Base class of optimizers that take another step with Sophia's m and h, which a Sophia with lr 0 keeps for
them: AdaHessian's step is one, the ablations of Sophia's own step are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia import Sophia
from sophia.curvature import Estimator
from sophia.lab.optimizers.contender import matrices_decayed

__all__ = ["OnSophiaAverages"]


class OnSophiaAverages(Optimizer):
    """m and h are those of a Sophia with lr 0; what is done with them is a subclass's ``_directions``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: str | Estimator,
        betas: tuple[float, float],
        weight_decay: float,
        defaults: dict[str, Any],
        **sophia: Any,
    ) -> None:
        """``defaults`` are this optimizer's own settings, lr among them; ``sophia`` are Sophia's (gamma, eps,
        update_every, fraction, seed).
        """
        self.averages = Sophia(model, lr=0.0, betas=betas, weight_decay=0.0, estimator=estimator, **sophia)
        super().__init__(matrices_decayed(model, {"weight_decay": weight_decay}), defaults)
        self.state = self.averages.state

    def _directions(self, moves: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Iterator[Tensor]:
        """From (m, h, group) of each parameter, the steps in units of lr, in the same order."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let Sophia bring m and h up to date, then move."""
        loss = self.averages.step(closure)
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [(self.state[p]["exp_avg"], self.state[p]["hessian"], group) for p, group in moving]
        for (theta, group), direction in zip(moving, self._directions(moves), strict=True):
            theta.mul_(1 - group["lr"] * group["weight_decay"])
            theta.add_(direction, alpha=-group["lr"])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; Sophia forgets the forwards whose gradients go."""
        self.averages.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Sophia's books; the groups here hold settings alone."""
        return {"sophia": self.averages.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self.averages.load_state_dict(state_dict["sophia"])
        self.state = self.averages.state
