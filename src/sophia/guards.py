"""Checks of what a user hands in, and the warning that is given where an error would be too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["SophiaWarning", "check_group", "check_option"]


class SophiaWarning(RuntimeWarning):
    """Training goes on, but what runs may not be what you think it is."""


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first setting of a parameter group that cannot be meant."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(
            f"lr is a tensor of {lr.numel()} elements: the learning rate of a group is one number"
        )
    _number("lr", lr, at_least=0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            f"betas={betas!r}: give two numbers, the decay of m and the decay of h, e.g. (0.96, 0.99)"
        )
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        _number(name, beta, at_least=0.0, below=1.0)
    _number("gamma", group["gamma"], above=0.0)
    # With eps = 0 a coordinate whose m and h are both zero (an unseen token's embedding) would be 0 / 0.
    _number("eps", group["eps"], above=0.0)
    _number("weight_decay", group["weight_decay"], at_least=0.0)
    every = group["update_every"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(
            f"update_every={every!r}: h is renewed every so many steps, a whole number from 1; the paper "
            "has 10"
        )
    if group["fused"] and group["foreach"]:
        raise RuntimeError(
            "`fused` and `foreach` cannot be `True` together: leave both at None to let Sophia choose"
        )
    if group["fused"]:
        raise RuntimeError(
            "fused=True: Sophia has no fused kernel in this version. Leave fused=None to let Sophia choose "
            "the fastest path"
        )
    if group["differentiable"] and (group["foreach"] or group["capturable"]):
        raise RuntimeError(
            "differentiable=True runs tensor by tensor: it goes with neither foreach=True nor capturable=True"
        )


def check_option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, allowed))}")


def check_fraction(value: Any) -> None:
    """Raise ValueError unless ``value`` is a share of the batch."""
    _number("fraction", value, above=0.0)
    if value > 1:
        raise ValueError(f"fraction={value!r}: the share of the batch used for a refresh is at most 1")


def check_gradient(gradient: Tensor, parameter: Tensor) -> None:
    """Raise RuntimeError for a gradient that the update cannot take, before anything has moved."""
    if gradient.is_sparse or gradient.layout != torch.strided:
        raise RuntimeError(
            "Sophia does not support sparse gradients (an Embedding with sparse=True?): m and h are dense. "
            "Build the layer with sparse=False"
        )
    if gradient.is_complex() or parameter.is_complex():
        raise RuntimeError(
            "Sophia does not support complex parameters: curvature is defined coordinate by coordinate. Use "
            "torch.view_as_real"
        )


def _number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: expected a number") from None
    if not math.isfinite(number) or number <= above or number < at_least or number >= below:
        bounds = [
            f"above {above:g}" if above > -math.inf else "",
            f"at least {at_least:g}" if at_least > -math.inf else "",
        ]
        bounds += [f"below {below:g}" if below < math.inf else ""]
        raise ValueError(f"{name}={value!r}: expected a finite number {' and '.join(b for b in bounds if b)}")
