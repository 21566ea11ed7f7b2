"""Two forwards compared with every random operation held still, and no weight asleep.

The outputs of some rows must not depend on the others if a refresh is to run them alone. They do under
BatchNorm, with time as the first dimension, in contrast over the batch, in graphs, for experts with a
capacity, or where a mask has as many rows as the batch by chance. All of that shows in the outputs, unless a
layer is initialised to zero: then nothing would depend on anything, at first.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sophia.distributed.shards import local
from sophia.refresh.eager import eager

__all__ = ["TOLERANCE", "Still", "awake", "difference", "held_still", "kind_of_inputs"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference over the largest output, by dtype: for another number of rows kernels sum in another
order.
"""
_ASLEEP = 0.2
"""Size under which a parameter that is one number everywhere is taken for one that lets nothing through."""


def kind_of_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> Hashable:
    """What one proof holds for: of each tensor the dtype, and which dimensions are as long as the batch.

    >>> kind_of_inputs((torch.zeros(4, 7), torch.zeros(4, 4)), {}, 4)
    ((torch.float32, (True, False)), (torch.float32, (True, True)))
    """
    found: list[Hashable] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append((value.dtype, tuple(size == batch for size in value.shape)))
        elif isinstance(value, Mapping):
            for name, item in value.items():
                found.append(name)
                visit(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit(args)
    visit(dict(kwargs))
    return tuple(found)


def held_still(outputs: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Outputs of a forward in which every random operation gives a constant."""
    # With gradients on, as in the training: models that differentiate, or register hooks, inside of their
    # forward do not run without.
    with Still(), torch.enable_grad(), eager():  # type: ignore[no-untyped-call]
        # Layers dropped by Python's or NumPy's generator; the sandbox puts both back.
        random.seed(0)
        if (numpy := sys.modules.get("numpy.random")) is not None:
            numpy.seed(0)
        return [tensor.detach() for tensor in outputs()]


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """How outputs of rows that were run alone differ from those in the whole batch; None if they do not."""
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return f"their outputs have shape {tuple(b.shape)} alone and {tuple(a.shape)} in the batch"
        if not a.numel() or not bool(a.isfinite().all()):
            continue  # nothing can be told from what is not finite; the pass itself will say so
        size, gap = float(a.abs().max()), float((a - b).abs().max())
        if not gap <= TOLERANCE.get(a.dtype, 1e-3) * size:
            return f"their outputs alone differ by {gap:.2g} from those in the batch, of size {size:.2g}"
    return None


@contextmanager
def awake(parameters: Iterable[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Inside, parameters that are one small number everywhere hold noise instead.

    Layers are often initialised to zero, or scaled by a millionth, so that blocks begin as the identity:
    nothing that passes through them would be seen in a comparison of outputs. One number is enough to put
    each back, so this takes no memory. Values are written past autograd, which a graph that still waits for
    its backward would take for a change.
    """
    asleep: list[tuple[Tensor, float]] = []
    for parameter in parameters:
        values = local(parameter.data)
        # Not quantised weights and the like, which are tensors of other classes.
        if type(values) is Tensor and values.is_floating_point() and values.numel():
            low, high = (float(end) for end in torch.aminmax(values))
            if low == high and abs(low) < _ASLEEP:
                asleep.append((values, low))
    try:
        for values, _ in asleep:
            deviation = values.shape[-1] ** -0.5 if values.ndim > 1 else 0.5
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float32) * deviation
            values.copy_(noise)
        yield
    finally:
        for values, value in asleep:
            values.fill_(value)


class Still(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, random operations give constants: dropout keeps everything, noise is one number.

    Neither modules nor their modes are touched, so that dropout by function and layers dropped at random are
    held still as well. The generators do not advance.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("native_dropout", "_fused_dropout"):
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names:  # fused attention
            place = names.index("dropout_p")
            if place < len(args):
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
            return func(*args, **kwargs)
        constant = 1 if "bernoulli" in name else 0
        with _unmoved():
            return _filled(func(*args, **kwargs), constant)


def _filled(value: Any, constant: int) -> Any:
    if isinstance(value, Tensor):
        return value.fill_(constant)
    return (
        type(value)(_filled(item, constant) for item in value) if isinstance(value, (tuple, list)) else value
    )


@contextmanager
def _unmoved() -> Iterator[None]:
    """The generators as before, afterwards."""
    with torch.random.fork_rng(devices=[]):
        yield
