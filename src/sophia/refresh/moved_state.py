"""What a forward may move beside the trained parameters: buffers, frozen parameters, attributes of modules.

Kept as references and, where it is small or known to move, as copies; put back bit for bit. Attributes are
tensors, numbers, lists, tuples and dictionaries of them, and random generators; of any other object the
reference alone is put back. Nothing is kept of what carries a graph: a forward makes that anew.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State", "same_state"]

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_COPIED = 2**16
"""Entries of a tensor that is copied although it has not been seen to move."""
_HELD = 2**20
"""Entries of a tensor that is kept from before a training forward, which may have let go of it."""
_LOOKED_THROUGH = 256
"""Items of a list or a dictionary in which tensors are looked for."""
_MISSING = object()
_PLAIN = (Tensor, int, float, complex, str, list, tuple, dict, deque, type(None))
# Books of wrappers, whose entries stand for streams, groups and graphs: not ours to turn back.
_WRAPPERS = ("torch.distributed", "torch._dynamo", "torch.nn.parallel", "deepspeed")


class State:
    """The state of a model at one moment.

    Args:
        model: whose state; None for none.
        moving: modules (by id) whose tensors are copied whatever their size.
        only: look at these modules alone.
        light: hold on to nothing large.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        moving: Collection[int] = (),
        only: Collection[int] | None = None,
        light: bool = False,
    ) -> None:
        self._parts: list[tuple[int, _Part]] = []  # of which module
        for module in () if model is None else model.modules():
            if only is not None and id(module) not in only:
                continue
            whole = id(module) in moving
            # A normalisation in training does not read its statistics, and there are many of them.
            if module._buffers and not (light and isinstance(module, nn.modules.batchnorm._NormBase)):
                self._add(module, _Names(module._buffers, module._buffers), whole or not light)
            frozen = {n: p for n, p in module._parameters.items() if p is not None and not p.requires_grad}
            if frozen:
                self._add(module, _Names(module._parameters, frozen), whole)
            own = vars(module)
            if not type(module).__module__.startswith(_WRAPPERS):
                kept = {
                    name: value
                    for name, value in own.items()
                    if name not in _OF_EVERY_MODULE and not (light and _is_large(value))
                }
                self._add(module, _Names(own, kept, known=frozenset(own)), whole)

    def _add(self, module: nn.Module, names: _Names, whole: bool) -> None:
        self._parts.append((id(module), names))
        for value in names.values.values():
            self._parts.extend((id(module), part) for part in _parts(value, whole))

    def moved(self) -> tuple[State | None, set[int]]:
        """The part of it that is no longer so, None if all of it is, and in which modules (by id)."""
        found = State(None)
        found._parts = [(where, now) for where, part in self._parts if (now := part.moved()) is not None]
        return (found if found._parts else None), {where for where, _ in found._parts}

    @property
    def complete(self) -> bool:
        """Whether all of it can be restored: a large tensor is copied only once it is known to move."""
        return all(part.complete for _, part in self._parts)

    def restore(self) -> None:
        """Make it so again."""
        for _, part in self._parts:
            part.restore()


@contextmanager
def same_state(model: nn.Module, *, moving: Collection[int] = ()) -> Iterator[None]:
    """The state of a model is as before, afterwards."""
    state = State(model, moving=moving)
    try:
        yield
    finally:
        state.restore()


class _Part:
    """A piece of state."""

    complete = True
    """Whether it can be restored."""

    def moved(self) -> _Part | None:
        """What of it is no longer so, None if nothing."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make it so again."""
        raise NotImplementedError


class _Names(_Part):
    """What the names in a dictionary refer to.

    Args:
        place: the dictionary.
        values: what some of the names refer to.
        known: all names there are, where names that are added are taken away again.
    """

    def __init__(
        self,
        place: dict[str, Any],
        values: dict[str, Any],
        *,
        known: Collection[str] | None = None,
        added: Collection[str] = (),
    ) -> None:
        self.place, self.values, self._known, self._to_remove = place, dict(values), known, tuple(added)

    def _added(self) -> list[str]:
        if self._known is None or len(self.place) <= len(self._known):
            return []
        return [
            name for name, now in self.place.items() if name not in self._known and isinstance(now, _PLAIN)
        ]

    def moved(self) -> _Part | None:
        others = {
            name: value
            for name, value in self.values.items()
            if self.place.get(name, _MISSING) is not value
            and not _carries_graph(value)
            and not _carries_graph(self.place.get(name))
        }
        added = [name for name in self._added() if not _carries_graph(self.place[name])]
        return _Names(self.place, others, added=added) if others or added else None

    def restore(self) -> None:
        for name, value in self.values.items():
            if self.place.get(name, _MISSING) is not value:
                self.place[name] = value
        for name in (*self._to_remove, *self._added()):
            self.place.pop(name, None)


class _Contents(_Part):
    """The entries of a tensor."""

    def __init__(self, tensor: Tensor, whole: bool) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._copy = tensor.detach().clone() if whole or tensor.numel() <= _COPIED else None
        self.complete = self._copy is not None

    def _same(self) -> bool:
        # Compared, not only asked for its version: kernels, and writes through .data, do not count.
        if self._copy is None:
            return self._tensor._version == self._version
        return torch.equal(self._tensor, self._copy)

    def moved(self) -> _Part | None:
        return None if self._same() else self

    def restore(self) -> None:
        # Written to only if it differs, as a graph that is still alive may have saved it.
        if self._copy is not None and not self._same():
            with torch.no_grad():
                self._tensor.copy_(self._copy)


class _Items(_Part):
    """What stands in a list, a queue or a dictionary."""

    def __init__(self, place: Any) -> None:
        self._place, self._items = place, place.copy()

    def _same(self) -> bool:
        if len(self._place) != len(self._items):
            return False
        if isinstance(self._place, dict):
            return all(self._place.get(k, _MISSING) is v for k, v in self._items.items())
        return all(a is b for a, b in zip(self._place, self._items, strict=True))

    def moved(self) -> _Part | None:
        return None if self._same() else self

    def restore(self) -> None:
        if not self._same():
            self._place.clear()
            (self._place.update if isinstance(self._place, dict) else self._place.extend)(self._items)


class _Generator(_Part):
    """The state of a random generator that a module holds."""

    def __init__(self, generator: Any) -> None:
        self._generator, self._state = generator, _read(generator)

    def moved(self) -> _Part | None:
        now = _read(self._generator)
        same = torch.equal(now, self._state) if isinstance(now, Tensor) else now == self._state
        return None if same else self

    def restore(self) -> None:
        if isinstance(self._generator, torch.Generator):
            self._generator.set_state(self._state)
        elif isinstance(self._generator, random.Random):
            self._generator.setstate(self._state)
        else:
            self._generator.bit_generator.state = self._state


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _parts(value: Any, whole: bool, depth: int = 3) -> Iterator[_Part]:
    """The pieces of one value, from the inside out."""
    if isinstance(value, Tensor):
        if _is_plain(value):
            yield _Contents(value, whole)
    elif isinstance(value, (list, deque, dict)) and depth:
        # Not classes of their own, which may have a copy() and an order of theirs.
        if type(value).__module__ in ("builtins", "collections"):
            yield from _of_items(value, whole, depth)
            yield _Items(value)
    elif isinstance(value, tuple) and depth:
        yield from _of_items(value, whole, depth)
    elif isinstance(value, (torch.Generator, random.Random)) or _is_numpys(value):
        yield _Generator(value)


def _of_items(value: Any, whole: bool, depth: int) -> Iterator[_Part]:
    if len(value) <= _LOOKED_THROUGH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts(item, whole, depth - 1)


def _is_numpys(value: Any) -> bool:
    numpy: Any = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, numpy.Generator)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_inference()
        and not tensor.requires_grad
    )


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > _HELD


def _carries_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
