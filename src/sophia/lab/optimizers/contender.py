"""What a contender is: how to build it, its settings, its search space, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config import run
from sophia.lab.config.run import Setting
from sophia.lab.config.search_space import Choice, Space
from sophia.lab.support.errors import UsageError
from sophia.numerics import versions, words
from sophia.step.groups import matrices_and_vectors

__all__ = [
    "DECAYS",
    "SIGN_DECAYS",
    "WARMUPS",
    "Contender",
    "Settings",
    "matrices_decayed",
    "state_bytes",
]

Settings = Mapping[str, Setting]

# What a search may vary alike for many contenders, so that none has the better choice.
DECAYS = Choice((0.0, 0.03, 0.1, 0.2))
SIGN_DECAYS = Choice((0.0, 0.1, 0.3, 1.0))
"""Of optimizers whose lr is about a third of AdamW's: lr times decay is what shrinks the weights."""
WARMUPS = Choice((0.05, 0.1, 0.2))


@dataclass(frozen=True)
class Contender:
    """An optimizer that the lab can compare: one file of this folder each, listed in ``table``."""

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
    parts: tuple[str, ...] = ()
    """The parts of Sophia whose numbers it uses, as in ``sophia.numerics``: their versions are in the names
    of its runs.
    """
    line: str = ""
    """What a training script writes for it, for a contender that the library itself has."""
    line_has: Settings = field(default_factory=dict)
    """The settings which that line has otherwise than ``defaults``, by its values. A test holds it to be all
    of them.
    """
    version: int = 1
    """Of the numbers of its own code; raised by whoever changes them, when they are recorded already."""

    @property
    def numerics(self) -> dict[str, int]:
        """The versions of all numbers that it computes."""
        own = {self.name: self.version} if self.version != 1 else {}
        return versions(*self.parts) | own

    def configured(self, over: Settings) -> run.Optimizer:
        """What a run's configuration holds: the settings, with ``over`` in place of defaults; numerics."""
        return run.Optimizer(self.name, self.settings(over), words(self.numerics))

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


def matrices_decayed(
    model: nn.Module, settings: Settings, *, only: Callable[[str], bool] = lambda name: True
) -> list[dict[str, Any]]:
    """Parameter groups: matrices with the decay of the settings, vectors (biases, gains) without.

    Of all parameters, or of those whose name ``only`` takes; in the order of the model, and no empty group.
    Without a setting of that name there is no decay to give.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in part if only(name)]} for part in matrices_and_vectors(model)
    ]
    if "weight_decay" in settings:
        groups[0]["weight_decay"], groups[1]["weight_decay"] = settings["weight_decay"], 0.0
    return [group for group in groups if group["params"]]
