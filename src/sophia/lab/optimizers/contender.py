"""What a contender is: how to build it, its settings, its search space, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.run import Setting
from sophia.lab.config.search_space import Space
from sophia.lab.support.errors import UsageError

__all__ = ["Contender", "Settings", "decayed_and_not", "state_bytes"]

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    name: str
    title: str
    """For people: what it is and where it comes from."""
    build: Callable[[nn.Module, Settings, int], Optimizer]
    """(model, settings, seed) -> optimizer. ``settings["lr"]`` is the peak learning rate."""
    defaults: Settings
    """Every setting, by name; presets put their own values over these."""
    space: Space
    """What a search may vary."""
    state_per_parameter: int
    """Bytes of optimizer state for a trained number that belongs to a matrix; 0 if it is next to nothing, or
    not known before it is measured.
    """
    gradients: Callable[[Settings], float] = lambda settings: 0.0
    """Extra gradient evaluations of a step, on average."""
    closure: bool = False
    """Whether ``step`` is given a closure that does the batch again: zeroes the gradients, computes them
    where the weights are now, clips them, and returns the loss.
    """

    def settings(self, over: Settings) -> dict[str, Setting]:
        """The defaults with other values put over them. Raises ``UsageError`` for a name or type that is none
        of them.
        """
        merged = dict(self.defaults)
        for name, value in over.items():
            if name not in merged:
                raise UsageError(
                    f"{self.name} has no setting {name!r}, and it must not be ignored silently. "
                    f"Its settings are {', '.join(merged)}."
                )
            if isinstance(merged[name], float) and type(value) is int:
                value = float(value)
            if type(value) is not type(merged[name]):
                raise UsageError(f"{self.name}: {name} is {value!r}. Write a {type(merged[name]).__name__}.")
            merged[name] = value
        return merged


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors an optimizer keeps between steps, measured."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def decayed_and_not(
    model: nn.Module, settings: Settings, *, only: Callable[[str], bool] = lambda name: True
) -> list[dict[str, Any]]:
    """Matrices with decay, the rest (biases, gains) without, in the order of the model.

    Without a setting of that name there is no decay to give.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and only(name)]
    matrices = [p for _, p in named if p.ndim >= 2]
    rest = [p for _, p in named if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest}]
    if "weight_decay" in settings:
        groups = [
            {**group, "weight_decay": decay}
            for group, decay in zip(groups, (settings["weight_decay"], 0.0), strict=True)
        ]
    return [group for group in groups if group["params"]]
