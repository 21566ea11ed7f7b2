"""NAdam of torch with decoupled decay."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.optimizers import adamw
from sophia.lab.optimizers.contender import Contender, Settings, matrices_decayed

__all__ = ["CONTENDER", "build"]


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """NAdam with decoupled decay."""
    return torch.optim.NAdam(
        matrices_decayed(model, s),
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        eps=float(s["eps"]),
        momentum_decay=float(s["momentum_decay"]),
        decoupled_weight_decay=True,
    )


CONTENDER = Contender(
    name="nadamw",
    title="NAdam with decoupled decay (torch)",
    build=build,
    defaults={
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "momentum_decay": 4e-3,
        "weight_decay": 0.1,
    },
    space=adamw.SPACE,
    state_per_parameter=8,
)
