"""A contender to copy: momentum divided by its own root mean square, so that every tensor takes a step of the
same size.

    cp _template.py calm.py     # then fill in, from top to bottom
    table.py                    # name the file in FILES

`sophia contenders calm`, `sophia train --contender calm` and `sophia sweep calm` then know it. Give it a
test of its step beside the others in tests/lab/optimizers/test_contenders.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.optimizers.contender import (
    DECAYS,
    WARMUPS,
    Contender,
    Settings,
    matrices_decayed,
)

__all__ = ["CONTENDER", "Calm", "build"]


# 1. The optimizer. Leave the class out if torch has it: see adamw.py. The lab needs groups with an "lr",
#    which its schedule writes before each step, and all state in `state`, so that a run can be resumed.
class Calm(Optimizer):
    """m <- beta m + (1 - beta) g, then theta <- theta (1 - lr wd) - lr m / rms(m)."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 3e-3,
        beta: float = 0.9,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

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
                m = state["exp_avg"].lerp_(theta.grad, 1 - group["beta"])
                theta.mul_(1 - group["lr"] * group["weight_decay"])
                # A gradient of zeros has no direction: the small number keeps 0 / 0 away.
                theta.add_(m / (m.square().mean().sqrt() + 1e-12), alpha=-group["lr"])
        return loss


# 2. From a model and settings to the optimizer. Matrices are decayed and vectors are not, as for all
#    contenders. `seed` is for optimizers that draw numbers of their own.
def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Calm."""
    return Calm(matrices_decayed(model, s), lr=float(s["lr"]), beta=float(s["beta"]))


# 3. What the lab has to know.
CONTENDER = Contender(
    name="calm",
    title="momentum over its root mean square (template)",
    build=build,
    # Every setting, a plain value each. All of them are in the name of a run: once a run is recorded,
    # neither names nor values may change.
    defaults={"lr": 3e-3, "beta": 0.9, "weight_decay": 0.1},
    # What a search may vary. Give an equal search: as wide as AdamW's in what both have.
    space={
        "lr": LogRange(3e-4, 3e-2),
        "beta": Choice((0.8, 0.9, 0.95)),
        "weight_decay": DECAYS,
        WARMUP: WARMUPS,
    },
    # Bytes of state for a number of a matrix: m in float32.
    state_per_parameter=4,
    # Beyond one forward and backward a step: `gradients` says how many more (sophia.py), and `closure`
    # that `step` computes the gradients again by itself.
)
