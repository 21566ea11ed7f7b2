"""Lion, which torch lacks. Chen et al., arXiv 2302.06675."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.optimizers.contender import (
    SIGN_DECAYS,
    WARMUPS,
    Contender,
    Settings,
    matrices_decayed,
)

__all__ = ["CONTENDER", "Lion", "build"]


class Lion(Optimizer):
    """theta <- theta (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; a closure computes loss and gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                if not state:
                    state["exp_avg"] = torch.zeros_like(theta)
                m, g = state["exp_avg"], theta.grad
                direction = m.lerp(g, 1 - beta1).sign_()
                m.lerp_(g, 1 - beta2)
                theta.mul_(1 - group["lr"] * group["weight_decay"])
                theta.add_(direction, alpha=-group["lr"])
        return loss


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Lion."""
    return Lion(matrices_decayed(model, s), lr=float(s["lr"]), betas=(float(s["beta1"]), float(s["beta2"])))


CONTENDER = Contender(
    name="lion",
    title="Lion (arXiv 2302.06675)",
    build=build,
    defaults={"lr": 3e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3},
    space={
        "lr": LogRange(5e-5, 5e-3),
        "beta1": Choice((0.8, 0.9, 0.95)),
        "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
        "weight_decay": SIGN_DECAYS,
        WARMUP: WARMUPS,
    },
    state_per_parameter=4,
)
