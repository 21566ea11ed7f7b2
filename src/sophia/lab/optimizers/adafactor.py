"""Adafactor of torch. Shazeer and Stern, arXiv 1804.04235."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.optimizers.contender import (
    DECAYS,
    WARMUPS,
    Contender,
    Settings,
    matrices_decayed,
)

__all__ = ["CONTENDER", "build"]


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Adafactor."""
    return torch.optim.Adafactor(
        matrices_decayed(model, s), lr=float(s["lr"]), beta2_decay=float(s["beta2_decay"]), d=float(s["d"])
    )


CONTENDER = Contender(
    name="adafactor",
    title="Adafactor (torch; arXiv 1804.04235): its lr is relative to the size of each tensor",
    build=build,
    defaults={"lr": 1e-2, "beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.1},
    space={
        "lr": LogRange(3e-3, 3e-1),
        "beta2_decay": Choice((-1.0, -0.8, -0.5)),
        "weight_decay": DECAYS,
        WARMUP: WARMUPS,
    },
    state_per_parameter=0,  # rows and columns: next to nothing
)
