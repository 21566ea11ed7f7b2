"""Checks of arguments, and ``SophiaWarning``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "SophiaWarning",
    "check_batch_dim",
    "check_fraction",
    "check_gradient",
    "check_number",
    "check_option",
]


class SophiaWarning(RuntimeWarning):
    """Training goes on, but what runs may not be what you think it is."""


def check_number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise ValueError, with name and value, unless ``value`` is a finite number within the bounds."""
    try:
        if isinstance(value, str):
            raise TypeError  # "1e-3" out of a YAML file: float() reads it, and the step cannot multiply by it
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: expected a number") from None
    if not math.isfinite(number) or number <= above or number < at_least or number >= below:
        bounds = [
            f"above {above:g}" if above > -math.inf else "",
            f"at least {at_least:g}" if at_least > -math.inf else "",
        ]
        bounds += [f"below {below:g}" if below < math.inf else ""]
        raise ValueError(f"{name}={value!r}: expected a finite number {' and '.join(b for b in bounds if b)}")


def check_option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, allowed))}")


def check_fraction(value: Any) -> None:
    """Raise ValueError unless ``value`` is a share of the batch."""
    check_number("fraction", value, above=0.0)
    if value > 1:
        raise ValueError(f"fraction={value!r}: the share of the batch used for a refresh is at most 1")


def check_batch_dim(value: Any) -> None:
    """Raise ValueError unless ``value`` is the number of a dimension, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(
            f"batch_dim={value!r}: the dimension of the outputs along which the rows lie is a number from 0, "
            "1 for outputs (T, B, V); None finds it"
        )


def check_gradient(gradient: Tensor) -> None:
    """Raise RuntimeError for a gradient that the update cannot take, before anything has moved."""
    if gradient.layout != torch.strided:
        raise RuntimeError(
            "Sophia does not support sparse gradients (an Embedding with sparse=True?): m and h are dense. "
            "Build the layer with sparse=False"
        )
    if gradient.is_complex():
        raise RuntimeError(
            "Sophia does not support complex parameters: curvature is defined coordinate by coordinate. Use "
            "torch.view_as_real"
        )
