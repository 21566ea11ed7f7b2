"""Logits that ``logits_fn`` computes: what counts in them, and weighs, found from the gradient in what they
are computed from.

The loop makes its own logits of the model's outputs, so that no gradient arrives in those that are made here.
In the outputs o it is J^T g, with J the derivative of the logits z(o) and g the gradient that is looked for.
Two cases are solved, and each is proved by the gradient itself:

own parts   each logit is made of its own part of the outputs (divided by a temperature, capped, put together,
            a difference of two scores): J J^T is diagonal, and g = J J^T g / diagonal. That it is diagonal is
            seen on a random vector, and J^T g must be what has arrived
contrast    logits are similarities of the batch with itself: of a cross-entropy whose labels are the
            places in the batch (0, 1, 2 ..., or half a batch on, or always the first) J^T g is known up to a
            factor, and must be what has arrived

Anything else stays unread: then all predictions count, as in a mean, and that is said.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports

from sophia.likelihoods import Head
from sophia.likelihoods.lines import digits
from sophia.refresh.model_outputs import tensors_in
from sophia.refresh.places import fields

__all__ = ["Computed"]

_NEAR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Distance, relative, of two gradients that are one."""


class Computed:
    """The logits of one forward, made once more of leaves in the place of its outputs.

    Args:
        leaves: in the place of the outputs, float32 or finer.
        logits: made of them, one for each head.
    """

    def __init__(self, leaves: Sequence[Tensor], logits: Sequence[Tensor]) -> None:
        self.leaves, self.logits = list(leaves), list(logits)
        self.arrived: list[Tensor | None] = [None] * len(self.leaves)
        self.late = False
        """Whether a gradient has come after the release."""
        self.kept: torch.dtype = torch.float64
        """Of whose digits the gradient is."""

    @classmethod
    def of(cls, output: Any, logits_of: Callable[[Any], Sequence[Tensor]]) -> Computed | None:
        """Listen to the outputs that logits are computed from; None if they cannot be computed once more."""
        sources = [t for t in tensors_in(fields(output)) if t.requires_grad and t.is_floating_point()]
        wide = [torch.promote_types(t.dtype, torch.float32) for t in sources]
        leaves = {id(t): t.detach().to(w).requires_grad_() for t, w in zip(sources, wide, strict=True)}
        try:
            made = cls(list(leaves.values()), logits_of(_replaced(output, leaves)))
            used = torch.autograd.grad(
                [z.sum() for z in made.logits], made.leaves, retain_graph=True, allow_unused=True
            )
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None  # weights in half precision, an output that cannot be put together again
        originals = {id(t): t for t in sources}
        pairs = zip(originals.values(), made.leaves, used, strict=True)
        listened = [(t, leaf) for t, leaf, g in pairs if g is not None]
        made = cls([leaf for _, leaf in listened], made.logits)
        if not listened or not (made._determined or all(map(_may_be_similarities, made.logits))):
            return None  # logits of hidden states: more numbers than arrive
        for number, (tensor, _) in enumerate(listened):
            tensor.register_hook(_Arrived(made, number))  # type: ignore[no-untyped-call]
        return made

    @property
    def _determined(self) -> bool:
        return sum(t.numel() for t in self.leaves) >= sum(z.numel() for z in self.logits)

    def release(self) -> None:
        """Let go of the graph, which is as large as the logits; from now on it is only noted that more
        comes.
        """
        self.leaves, self.logits, self.arrived = [], [], []

    def gradients(self) -> list[Tensor] | None:
        """The gradient in each of the logits, where each is made of its own part; None if not, or if the loss
        uses the outputs in another way as well.
        """
        arrived = self._filled(self.arrived)
        if not self._determined:
            return None
        ones = [torch.ones_like(z) for z in self.logits]
        generator = torch.Generator().manual_seed(0)
        some = [torch.rand(z.shape, generator=generator).to(z).add(0.5) for z in self.logits]
        squares = self._forward(self._back(ones))
        mixed = self._forward(self._back(some))
        if not _same(mixed, [s * d for s, d in zip(some, squares, strict=True)], 1e-4):
            return None
        found = [g / d.where(d > 0, torch.inf) for g, d in zip(self._forward(arrived), squares, strict=True)]
        if not _same(self._back(found), arrived, _NEAR.get(self.kept, 1e-3)):
            return None
        return [g.to(self.kept).to(g.dtype) for g in found]

    def factor_of_contrast(self, heads: Sequence[Head]) -> float | None:
        """What a mean cross-entropy of the similarities is multiplied with, its labels places in the batch;
        None if the loss is another one.
        """
        arrived = self._filled(self.arrived)
        size = sum(float(g.double().square().sum()) for g in arrived)
        for shift in (0, 0.5, None):
            guessed = [_of_places(z, head, shift) for z, head in zip(self.logits, heads, strict=True)]
            if any(g is None for g in guessed) or not size > 0:
                continue
            back = self._back([g for g in guessed if g is not None])
            across = sum(float((a.double() * b.double()).sum()) for a, b in zip(arrived, back, strict=True))
            own = sum(float(b.double().square().sum()) for b in back)
            factor = across / own if own > 0 else 0.0
            if factor > 0 and _same([factor * b for b in back], arrived, _NEAR.get(self.kept, 1e-3)):
                return factor
        return None

    def _back(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """``J^T v``."""
        found = torch.autograd.grad(self.logits, self.leaves, vectors, retain_graph=True, allow_unused=True)
        return self._filled(found)

    def _filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """One for each leaf, zero where there is none."""
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self.leaves, gradients, strict=True)]

    def _forward(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """``J u``, as the derivative of ``J^T v`` in v, of which it is a linear function."""
        free = [torch.zeros_like(z, requires_grad=True) for z in self.logits]
        back = torch.autograd.grad(
            self.logits, self.leaves, free, retain_graph=True, create_graph=True, allow_unused=True
        )
        pairs = [(g, u) for g, u in zip(back, vectors, strict=True) if g is not None and g.requires_grad]
        found = torch.autograd.grad(
            [g for g, _ in pairs], free, [u for _, u in pairs], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(z) if g is None else g for z, g in zip(self.logits, found, strict=True)]


class _Arrived:
    """Keeps what arrives in an output. Weak: the graph of the training must not keep the recording."""

    def __init__(self, computed: Computed, number: int) -> None:
        self._computed, self._number = weakref.ref(computed), number

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        computed = self._computed()
        if computed is None or gradient is None:
            return
        if not computed.leaves:
            computed.late = True
            return
        narrow = digits(gradient)
        if torch.finfo(narrow).eps > torch.finfo(computed.kept).eps:
            computed.kept = narrow
        so_far, own = (
            computed.arrived[self._number],
            gradient.detach().to(computed.leaves[self._number].dtype),
        )
        computed.arrived[self._number] = own if so_far is None else so_far + own


def _of_places(z: Tensor, head: Head, shift: float | None) -> Tensor | None:
    """Gradient in similarities ``(n, m)`` of their mean cross-entropy, if the label of row i is i + shift n,
    or 0 for None.
    """
    if head.likelihood.event_dims != 1 or z.ndim != 2 or min(z.shape) < 2:
        return None
    n, m = z.shape
    if m < n or (shift and m > n):  # none has its own place, or half a batch on is another row's
        return None
    places = torch.arange(n, device=z.device)
    labels = torch.zeros_like(places) if shift is None else (places + int(shift * n)) % m
    p = torch.softmax(z.detach(), -1)
    p[places, labels] -= 1
    return head.weight / n * p


def _may_be_similarities(z: Tensor) -> bool:
    """Whether the classes are places in the batch."""
    return z.ndim == 2 and min(z.shape) > 1 and z.shape[1] % z.shape[0] == 0


def _same(found: Sequence[Tensor], expected: Sequence[Tensor], near: float) -> bool:
    size = sum(float(b.double().square().sum()) for b in expected)
    gap = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))
    return gap <= near**2 * size


def _replaced(value: Any, by: Mapping[int, Tensor]) -> Any:
    """A nested output with other tensors in the places of some."""
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if isinstance(value, (tuple, list)):
        items = [_replaced(item, by) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        if type(value) is dict:
            return {name: _replaced(item, by) for name, item in value.items()}
        put: Any = copy.copy(value)
        for name, item in value.items():
            put[name] = _replaced(item, by)
        return put
    if any(True for _ in tensors_in(fields(value))):
        put = copy.copy(value)
        for name, item in fields(value).items():
            setattr(put, name, _replaced(item, by))
        return put
    return value
