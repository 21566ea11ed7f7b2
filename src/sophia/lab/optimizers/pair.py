"""Two optimizers as one: each trains parameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["Pair"]


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
