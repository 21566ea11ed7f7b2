"""Gradient descent with momentum, of torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.optimizers.contender import WARMUPS, Contender, Settings, matrices_decayed

__all__ = ["CONTENDER", "build"]


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Gradient descent with momentum; torch adds its decay to the gradient."""
    return torch.optim.SGD(matrices_decayed(model, s), lr=float(s["lr"]), momentum=float(s["momentum"]))


CONTENDER = Contender(
    name="sgd",
    title="gradient descent with momentum (torch); its decay is part of the gradient",
    build=build,
    defaults={"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4},
    space={
        "lr": LogRange(0.01, 3.0),
        "momentum": Choice((0.8, 0.9, 0.95)),
        # smaller than the others': decay in the gradient is multiplied by a larger lr
        "weight_decay": Choice((0.0, 1e-5, 1e-4, 1e-3)),
        WARMUP: WARMUPS,
    },
    state_per_parameter=4,
)
