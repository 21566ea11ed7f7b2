"""Proof that the rows of a batch are independent, by running the model: whole, and on the rows taken alone.

A refresh may run a part of the rows only where the outputs of these rows do not depend on the others. They
do under BatchNorm, with time as the first dimension, in contrast over the batch, in graphs, for experts with
a capacity, or where a mask has as many rows as the batch by chance. All of that shows in the outputs, with
every random operation held still: two forwards, once for each kind of input.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sophia.refresh.eager import eager

__all__ = ["Still", "difference", "kind_of_inputs", "rows_of"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference over the largest output, by dtype: for another number of rows kernels sum in another
order.
"""


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


def rows_of(value: Any, rows: Tensor, batch: int) -> Any:
    """These rows of every tensor that has as many as the batch."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == batch else value
    if type(value) is dict:
        return {key: rows_of(item, rows, batch) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(rows_of(item, rows, batch) for item in value)
    return value


def difference(
    whole: Callable[[], Sequence[Tensor]], part: Callable[[], Sequence[Tensor]], rows: Tensor
) -> str | None:
    """How the outputs of ``rows``, run alone, differ from those in the whole batch; None if they do not.

    Args:
        whole: runs the model on the whole batch and returns its outputs.
        part: runs it on the rows alone.
        rows: their numbers, ``(r,)``.
    """
    # With gradients on, as in the training: models that differentiate, or register hooks, inside of their
    # forward do not run without.
    with Still(), torch.enable_grad(), eager():  # type: ignore[no-untyped-call]
        _seed_python_and_numpy()
        together = [t.detach()[rows.to(t.device)] if _has(t, rows) else t.detach() for t in whole()]
        _seed_python_and_numpy()
        alone = [t.detach() for t in part()]
    for a, b in zip(together, alone, strict=True):
        if a.shape != b.shape:
            return f"their outputs have shape {tuple(b.shape)} alone and {tuple(a.shape)} in the batch"
        if not a.numel() or not bool(a.isfinite().all()):
            continue  # nothing can be told from what is not finite; the pass itself will say so
        size, gap = float(a.abs().max()), float((a - b).abs().max())
        if not gap <= _TOLERANCE.get(a.dtype, 1e-3) * size:
            return f"their outputs alone differ by {gap:.2g} from those in the batch, of size {size:.2g}"
    return None


def _seed_python_and_numpy() -> None:
    """Layers dropped by Python's or NumPy's generator; the sandbox puts both back."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(0)


def _has(tensor: Tensor, rows: Tensor) -> bool:
    return bool(tensor.ndim) and tensor.shape[0] > int(rows.max())


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
