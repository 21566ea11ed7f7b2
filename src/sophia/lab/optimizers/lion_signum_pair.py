"""Optimizers that torch lacks: Lion, Signum, and Muon with AdamW for the rest.

All decay their weights as AdamW does: theta <- theta (1 - lr wd), apart from the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Lion", "Pair", "Signum"]

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class _Sign(Optimizer):
    """theta <- theta (1 - lr wd) - lr sign(direction): what Lion and Signum share."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; a closure computes loss and gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                if not state:
                    state["exp_avg"] = torch.zeros_like(theta)
                theta.mul_(1 - group["lr"] * group["weight_decay"])
                theta.add_(self._direction(state["exp_avg"], theta.grad, group).sign_(), alpha=-group["lr"])
        return loss

    def _direction(self, m: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a fresh tensor whose sign is the step, and bring m up to date."""
        raise NotImplementedError


class Lion(_Sign):
    """Step sign(beta1 m + (1 - beta1) g), m <- beta2 m + (1 - beta2) g. Chen et al., arXiv 2302.06675."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _direction(self, m: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        direction = m.lerp(g, 1 - beta1)
        m.lerp_(g, 1 - beta2)
        return direction


class Signum(_Sign):
    """m <- beta m + (1 - beta) g, then step sign(m). Bernstein et al., arXiv 1802.04434."""

    def __init__(
        self, params: Params, lr: float = 1e-4, beta: float = 0.9, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    def _direction(self, m: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        m.lerp_(g, 1 - group["beta"])
        return m.clone()


class Pair(Optimizer):
    """Two optimizers over different parameters as one: one list of groups, one step, one state_dict."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.parts = (first, second)
        super().__init__(
            [{"params": list(g["params"])} for part in self.parts for g in part.param_groups], {}
        )
        self._share()

    def _share(self) -> None:
        # The very dictionaries of the parts, so that a schedule that writes group["lr"] reaches them.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state.clear()
        for part in self.parts:
            self.state.update(part.state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let both take a step on the same gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        self._share()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both state dictionaries."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()
