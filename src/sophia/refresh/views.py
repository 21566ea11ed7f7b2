"""Outputs that are views of one another: logits and their transpose, in a contrast in both directions.

What arrives in the tensor is the sum of what its own loss sent and of what came through the view. As views
move numbers and do not change them, the second is taken off again, and each output has the gradient of its
own loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports

__all__ = ["Geometry", "Through", "View", "is_view_of", "less_views", "listen", "viewed"]


class Geometry:
    """How a tensor lies in its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    @property
    def end(self) -> int:
        """One past the last number."""
        last = sum((size - 1) * step for size, step in zip(self.size, self.stride, strict=True))
        return int(self.offset + last + 1)

    def lay(self, flat: Tensor) -> Tensor:
        """That part of a memory."""
        return flat.as_strided(self.size, self.stride, self.offset)


class View:
    """One view, and what has arrived in it since its tensor took it off."""

    def __init__(self, view: Tensor, of: Tensor) -> None:
        self.own, self.of = Geometry(view), Geometry(of)
        self.gradients: list[Tensor] = []


class _Arrived:
    def __init__(self, view: View) -> None:
        self._view = weakref.ref(view)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        if (view := self._view()) is not None and gradient is not None:
            view.gradients.append(gradient.detach())


class Through:
    """Hook on a tensor that hands on what arrives in it as the gradient of a view of it."""

    def __init__(self, view: Tensor, of: Tensor, listener: Callable[[Tensor | None], None]) -> None:
        self.own, self.of, self.listener = Geometry(view), Geometry(of), listener

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        flat = gradient.new_zeros(max(self.own.end, self.of.end))
        self.of.lay(flat).copy_(gradient.detach())
        self.listener(self.own.lay(flat))


def is_view_of(view: Tensor, other: Tensor) -> bool:
    """Whether both lie in one memory without overlaps of their own; which is made of which, it does not
    say.
    """
    if view.layout != torch.strided or other.layout != torch.strided or view.dtype != other.dtype:
        return False
    try:
        same = view.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # tensor subclasses without memory of their own
        return False
    dense = all(
        step > 0 or size == 1 for t in (view, other) for size, step in zip(t.shape, t.stride(), strict=True)
    )
    return same and dense


def viewed(view: Tensor, returned: Iterable[Tensor]) -> Tensor | None:
    """The returned tensor of which ``view`` is made without changing a number."""
    return next((t for t in returned if t.requires_grad and is_view_of(view, t)), None)


def listen(view: Tensor, of: Tensor) -> View:
    """Keep what arrives in a view of ``of`` until it is asked for."""
    kept = View(view, of)
    view.register_hook(_Arrived(kept))  # type: ignore[no-untyped-call]
    return kept


def less_views(gradient: Tensor, views: Sequence[View]) -> Tensor:
    """What arrived in a tensor, less what came through views of it."""
    if not any(view.gradients for view in views):
        return gradient
    own = views[0].of
    flat = gradient.new_zeros(max(own.end, *(view.own.end for view in views)))
    for view in views:
        for part in view.gradients:
            view.own.lay(flat).add_(part)
    return gradient - own.lay(flat)


def forget(views: Sequence[View]) -> None:
    """What has arrived is taken off."""
    for view in views:
        view.gradients.clear()
