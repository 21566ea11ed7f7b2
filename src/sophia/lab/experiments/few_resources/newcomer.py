"""A stranger's optimizer, as a newcomer has it: a file of twenty lines in the working folder."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MODULE", "STRANGER", "newcomers_file"]

STRANGER = '''\
import torch


class Calm(torch.optim.Optimizer):
    """Momentum, divided by the root mean square of its own tensor."""

    sophia_defaults = {"lr": 3e-3, "beta": 0.9, "weight_decay": 0.1}
    sophia_space = {"lr": {"low": 3e-4, "high": 3e-2}, "beta": [0.8, 0.9, 0.95], "warmup": [0.05, 0.1, 0.2]}

    def __init__(self, params, lr, beta, weight_decay):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(m / (m.square().mean().sqrt() + 1e-12), alpha=-group["lr"])
        return loss
'''
"""The example of docs/third-party.md."""
MODULE = "newcomers_optimizer"


@contextmanager
def newcomers_file() -> Iterator[str]:
    """Within the block the stranger's class can be imported, as from a working folder; its path."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{MODULE}.py").write_text(STRANGER)
        sys.path.insert(0, folder)
        try:
            yield f"{MODULE}:Calm"
        finally:
            sys.path.remove(folder)
            sys.modules.pop(MODULE, None)
