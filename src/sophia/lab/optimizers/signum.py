"""Sign momentum (Signum), which torch lacks. Bernstein et al., arXiv 1802.04434."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.optimizers.contender import (
    SIGN_DECAYS,
    WARMUPS,
    Contender,
    Settings,
    matrices_decayed,
)
from sophia.lab.optimizers.lion import Lion

__all__ = ["CONTENDER", "Signum", "build"]


class Signum(Lion):
    """m <- beta m + (1 - beta) g, then theta <- theta (1 - lr wd) - lr sign(m): Lion with two equal betas."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        beta: float = 0.9,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, lr, (beta, beta), weight_decay)


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Sign momentum."""
    return Signum(matrices_decayed(model, s), lr=float(s["lr"]), beta=float(s["beta"]))


CONTENDER = Contender(
    name="signum",
    title="sign momentum (arXiv 1802.04434)",
    build=build,
    defaults={"lr": 3e-4, "beta": 0.9, "weight_decay": 0.3},
    space={
        "lr": LogRange(5e-5, 5e-3),
        "beta": Choice((0.6, 0.8, 0.9, 0.95)),
        "weight_decay": SIGN_DECAYS,
        WARMUP: WARMUPS,
    },
    state_per_parameter=4,
)
