"""The official rule as its users run it, written again: a loop over tensors, and a Hessian that is fed from
outside. For timing beside ours; the lab's contenders do not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OfficialRule"]


class OfficialRule(Optimizer):
    """theta <- theta (1 - lr wd) - lr sign(m) min(|m| / (rho bs h + 1e-15), 1), tensor by tensor.

    h here lacks the factor B, which comes in as ``bs`` at every step (arXiv 2305.14342v4, Algorithm 3; the
    table of names in ``sophia.update_rule``).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    def _held(self, theta: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[theta]
        if not state:
            state["exp_avg"], state["hessian"] = torch.zeros_like(theta), torch.zeros_like(theta)
        return state

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Take the gradient on sampled labels, squared, into h."""
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for theta in group["params"]:
                if theta.grad is not None:
                    h = self._held(theta)["hessian"]
                    h.mul_(beta2).addcmul_(theta.grad, theta.grad, value=1 - beta2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, bs: int = 5120) -> Any:
        """One step; ``bs`` is the number of predictions."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, lr = group["betas"][0], group["lr"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                held = self._held(theta)
                m = held["exp_avg"]
                theta.mul_(1 - lr * group["weight_decay"])
                m.mul_(beta1).add_(theta.grad, alpha=1 - beta1)
                ratio = (m.abs() / (group["rho"] * bs * held["hessian"] + 1e-15)).clamp(max=1)
                theta.addcmul_(m.sign(), ratio, value=-lr)
        return loss
