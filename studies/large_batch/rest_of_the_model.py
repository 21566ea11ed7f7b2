"""AdamW for all but the hidden matrices, which a candidate moves by itself: as beside Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sophia.lab.optimizers import adamw
from sophia.step.hidden_matrices import hidden_matrices

__all__ = ["by_adamw", "hidden_names"]


def hidden_names(model: nn.Module) -> set[str]:
    """Names of the hidden matrices."""
    hidden = hidden_matrices(model)
    return {name for name, p in model.named_parameters() if id(p) in hidden}


def by_adamw(model: nn.Module, lr: float, s: Mapping[str, Any]) -> Optimizer:
    """AdamW with the settings ``beta1``, ``beta2`` and ``weight_decay`` of ``s``."""
    hidden = hidden_names(model)
    settings = {"lr": lr, "eps": 1e-8, **{name: s[name] for name in ("beta1", "beta2", "weight_decay")}}
    return adamw.build(model, settings, 0, only=lambda name: name not in hidden)
