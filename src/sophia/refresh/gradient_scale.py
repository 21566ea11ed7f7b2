"""What happens to ``.grad`` between the backward and the step: measured on a few entries, and interpreted.

m is an average of what stands in ``.grad``; h is made from the weights of the predictions in the loss that
was back-propagated. If somebody multiplies ``.grad`` in between, h must follow: a ``GradScaler`` that takes
its scale out again, a trainer that divides by the number of tokens. Clipping it must not follow: as in the
paper, that shortens m alone. Both are a factor below one, so what is known of each tells them apart.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sophia.distributed.shards import local

__all__ = ["FAR", "GradientScale", "factor_of", "grad_scaler", "measured", "words"]

FAR = 1e4
"""A factor on ``.grad``, up or down, that no ordinary clipping makes."""

_TENSORS, _ENTRIES = 8, 16


class GradientScale:
    """Remembers a few entries of ``.grad`` at the end of a backward."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []  # a parameter, and entries of its gradient

    def remember(self, parameters: Iterable[Tensor]) -> None:
        """Take entries of the gradients that are there now."""
        held = [p for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
        step = max(1, len(held) // _TENSORS)
        self._kept = [(p, _entries(p.grad).clone()) for p in held[::step][:_TENSORS] if p.grad is not None]

    def forget(self) -> None:
        """Drop what was remembered."""
        self._kept = []

    def products(self) -> tuple[float, float, float]:
        """Of the entries then and now: then . then, then . now, now . now; to be summed over the ranks."""
        pairs = [(then, _entries(p.grad)) for p, then in self._kept if p.grad is not None]
        pairs = [(then, now) for then, now in pairs if then.shape == now.shape]
        if not pairs:
            return 0.0, 0.0, 0.0
        then, now = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
        square, product, other = torch.stack([then @ then, then @ now, now @ now]).tolist()
        return square, product, other


def measured(square: float, product: float, other: float) -> float | None:
    """The factor between then and now; None if nothing was remembered, or it is no single factor.

    >>> measured(4.0, 2.0, 1.0), measured(4.0, 0.0, 1.0)
    (0.5, None)
    """
    if not (square > 0 and math.isfinite(square) and math.isfinite(other) and product > 0):
        return None
    # One factor for all: the two are parallel.
    return product / square if product * product > 0.999 * square * other else None


def _entries(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    flat = local(gradient).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _ENTRIES)][:_ENTRIES].float()


def factor_of(measured: float | None, whole: float, scaler: float | None, *, micro_batches: int = 1) -> float:
    """The part of the measured factor that h must follow.

    Args:
        measured: of ``.grad``, between backward and step.
        whole: the sum of all weights, which is 1 for a mean.
        scaler: the scale of the ``GradScaler`` that takes the step, if one does.
        micro_batches: how many forwards the step has.

    >>> factor_of(1.0, 1.0, None), factor_of(0.2, 1.0, None)        # nothing; clipped
    (1.0, 1.0)
    >>> factor_of(2.0**-16, 2.0**16, 2.0**16)                       # unscaled
    1.52587890625e-05
    >>> factor_of(1 / 500, 500.0, None)                             # divided by the number of tokens
    0.002
    """
    if scaler is not None:
        return 1 / scaler
    if measured is None or abs(measured - 1) < 1e-3:
        return 1.0
    exponent = math.log2(measured)
    if measured > 1 or (exponent < -3.5 and abs(exponent - round(exponent)) < 1e-3):
        return measured  # multiplied by a host, or unscaled by hand
    if abs(measured * whole - 1) < 1e-2:
        return measured  # made a mean afterwards
    of_means = micro_batches > 1 and abs(whole - micro_batches) < 1e-2 * micro_batches
    if measured * whole < 1 and (of_means or (whole > 16 and measured < 1 / 16)):
        return 1 / whole  # made a mean afterwards, and clipped
    return 1.0


def words(scale: float) -> str:
    """What to say of gradients of that scale, in units of the loss that h is the curvature of.

    >>> words(1.5e-5)[:49]
    'the gradients in .grad are 1.5e-05 times those of'
    """
    cause = (
        "The scale of a GradScaler taken out twice, or a norm clipped before scaler.unscale_(optimizer), or "
        "to far below its size: unscale first, and give clip_grad_norm_ a max_norm near the usual norm"
        if scale < 1
        else "A GradScaler whose step is not used, or a multiplication after the backward: call "
        "scaler.step(optimizer), or multiply the loss instead"
    )
    return (
        f"the gradients in .grad are {scale:.2g} times those of the loss that was back-propagated, so m is, "
        f"and h is not: gamma acts as {1 / scale:.2g} times itself. {cause}"
    )


def grad_scaler() -> float | None:
    """The scale of the ``torch.amp.GradScaler`` that is taking the step now, None if there is none.

    It is found among the callers: its ``step`` has taken the scale out of ``.grad``, and tells nobody.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("step", "_maybe_opt_step"):
            caller: Any = frame.f_locals.get("self")
            if isinstance(caller, torch.amp.GradScaler):
                return float(caller.get_scale()) if caller.is_enabled() else None
        frame = frame.f_back
    return None
