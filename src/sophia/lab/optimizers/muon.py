"""Muon of torch for the matrices of the blocks, AdamW for embeddings, head and vectors."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.optimizers import adamw
from sophia.lab.optimizers.contender import DECAYS, WARMUPS, Contender, Settings
from sophia.lab.optimizers.pair import Pair
from sophia.lab.support.errors import LabError

__all__ = ["CONTENDER", "build"]


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Muon and AdamW as one optimizer."""
    if not hasattr(torch.optim, "Muon"):
        raise LabError(
            f"torch {torch.__version__} has no Muon, so this contender cannot run. Install torch 2.9 or "
            f"later."
        )
    shapes = {name: p.ndim for name, p in model.named_parameters()}

    def hidden(name: str) -> bool:  # matrices of the blocks; embeddings, head, norms and biases go to AdamW
        return shapes[name] == 2 and ".h." in name

    matrices = [p for name, p in model.named_parameters() if hidden(name)]
    muon = torch.optim.Muon(
        matrices,
        lr=float(s["lr"]),
        momentum=float(s["momentum"]),
        weight_decay=float(s["weight_decay"]),
        adjust_lr_fn="match_rms_adamw",  # learning rates in the units of AdamW
    )
    rest = adamw.build(model, {**s, "lr": s["adamw_lr"]}, seed, only=lambda name: not hidden(name))
    return Pair(muon, rest)


CONTENDER = Contender(
    name="muon",
    title="Muon (torch) for hidden matrices, AdamW for the rest",
    build=build,
    defaults={
        "lr": 2e-3,
        "momentum": 0.95,
        "adamw_lr": 2e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
    },
    space={
        "lr": LogRange(3e-4, 3e-2),
        "adamw_lr": LogRange(3e-4, 3e-2),
        "momentum": Choice((0.8, 0.9, 0.95)),
        "beta1": Choice((0.7, 0.8, 0.9)),
        "weight_decay": DECAYS,
        WARMUP: WARMUPS,
    },
    state_per_parameter=4,
)
