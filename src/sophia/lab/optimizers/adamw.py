"""AdamW of torch: the baseline of every comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange, Space
from sophia.lab.optimizers.contender import (
    DECAYS,
    WARMUPS,
    Contender,
    Settings,
    matrices_decayed,
)

__all__ = ["CONTENDER", "SPACE", "build"]


def build(model: nn.Module, s: Settings, seed: int, **only: Any) -> Optimizer:
    """AdamW, fused, of all parameters or of those whose name ``only`` takes."""
    betas = (float(s["beta1"]), float(s["beta2"]))
    return torch.optim.AdamW(
        matrices_decayed(model, s, **only), lr=float(s["lr"]), betas=betas, eps=float(s["eps"]), fused=True
    )


SPACE: Space = {
    "lr": LogRange(3e-4, 3e-2),
    "beta1": Choice((0.7, 0.8, 0.9, 0.95)),
    "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
    "weight_decay": DECAYS,
    WARMUP: WARMUPS,
}
"""Searched for AdamW, and for the optimizers that differ from it in one thing."""

CONTENDER = Contender(
    name="adamw",
    title="AdamW (torch, fused)",
    build=build,
    defaults={"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    space=SPACE,
    state_per_parameter=8,
)
