"""AdamW with two learning rates, one for hidden matrices and one for the rest: what a step rule that scales
kinds of tensors apart has to beat.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import LogRange
from sophia.lab.optimizers import adamw
from sophia.lab.optimizers.contender import Contender, Settings
from sophia.lab.optimizers.pair import Pair
from sophia.step.hidden_matrices import hidden_matrices

__all__ = ["CONTENDER", "build"]


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Two AdamWs as one: ``lr`` for embeddings, head and vectors, ``matrix_lr`` for hidden matrices."""
    hidden = hidden_matrices(model)
    inner = {name for name, p in model.named_parameters() if id(p) in hidden}
    return Pair(
        adamw.build(model, s, seed, only=lambda name: name not in inner),
        adamw.build(model, {**s, "lr": s["matrix_lr"]}, seed, only=lambda name: name in inner),
    )


CONTENDER = Contender(
    name="adamw-apart",
    title="AdamW with a learning rate of its own for hidden matrices (torch, fused)",
    build=build,
    defaults={
        "lr": 4e-3,
        "matrix_lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
    },
    space={**adamw.SPACE, "matrix_lr": LogRange(3e-4, 1e-2)},
    state_per_parameter=8,
)
