"""Where a tensor stands in what a model returned, so that it is found again in a replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Place", "at", "fields", "names_in", "places_in", "written"]

Place = tuple[Hashable, ...]
"""Names and numbers, from the outside in: ``("aux",)``, ``(0, 2)``; empty for the output itself."""


def fields(output: Any) -> Any:
    """An output as something that holds tensors: outputs that are plain objects by their attributes."""
    if isinstance(output, (Tensor, tuple, list, Mapping)):
        return output
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name, None) for field in dataclasses.fields(output)}
    return getattr(output, "__dict__", {})


def places_in(output: Any, above: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """All tensors of a nested output, with their places.

    >>> import torch
    >>> [place for place, _ in places_in({"logits": torch.ones(1), "more": [torch.ones(1), None]})]
    [('logits',), ('more', 0)]
    """
    held = output if above else fields(output)
    if isinstance(held, Tensor):
        yield above, held
    elif isinstance(held, Mapping):
        for name, item in held.items():
            yield from places_in(item, (*above, name))
    elif isinstance(held, (tuple, list)):
        for number, item in enumerate(held):
            yield from places_in(item, (*above, number))


def at(output: Any, place: Place) -> Tensor | None:
    """What stands there now; None if it is no tensor, or the output has no such place."""
    held = fields(output)
    try:
        for name in place:
            held = held[name]
    except (KeyError, IndexError, TypeError):
        return None
    return held if isinstance(held, Tensor) else None


def written(output: Any, place: Place) -> str:
    """The place as one writes it in Python.

    >>> written({}, ("more", 0))
    "output['more'][0]"
    """
    plain = not isinstance(output, (tuple, list, Mapping))
    first = "".join(f".{name}" if plain else f"[{name!r}]" for name in place[:1])
    return f"output{first}" + "".join(f"[{name!r}]" for name in place[1:])


def names_in(output: Any) -> str:
    """The tensors that an output does have, by name, for a message."""
    held = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    names = [str(name) for name, value in held.items() if isinstance(value, Tensor)]
    return f", which holds {', '.join(names[:8])}" if names else ""
