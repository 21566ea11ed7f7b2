"""A small classifier and its batches, for hosts that train any module; and the mean of many estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sophia import Sophia

INPUTS, CLASSES = 6, 4


class Classifier(nn.Module):
    """Two layers, logits."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.hidden, self.head = nn.Linear(INPUTS, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def examples(number: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    g = torch.Generator().manual_seed(number)
    return torch.randn(number, INPUTS, generator=g), torch.randint(0, CLASSES, (number,), generator=g)


def batches(number: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """The same in batches, in order."""
    x, y = examples(number)
    return list(zip(x.split(size), y.split(size), strict=True))


def mean_estimate(opt: Sophia, step: Callable[[], object], draws: int) -> dict[Tensor, Tensor]:
    """Mean over ``draws`` steps of what each has estimated, by parameter.

    The state is the last estimate itself: Sophia with ``betas=(0.9, 0.0), update_every=1``, and ``lr=0.0,
    weight_decay=0.0`` so that the weights stay.
    """
    sums: dict[Tensor, Tensor] = {}
    for _ in range(draws):
        step()
        for p, state in opt.state.items():
            sums[p] = sums.get(p, 0) + state["hessian"].double() / draws
    return sums


ESTIMATE = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0), "update_every": 1, "fraction": 1.0}
"""Settings for ``mean_estimate``."""


def trace_ratio(found: dict[Tensor, Tensor], exact: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Sum of the estimates over the sum of the exact diagonal, given by parameter."""
    exact = list(exact)
    return float(sum(found[p].sum() for p, _ in exact) / sum(e.sum() for _, e in exact))
