"""Division of a micro-batch into parts: rows along its batch dimension, or the documents of a packed row.

Here it is only said where parts may lie. Whether they are independent is proved by running them
(``cuts.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia.refresh.model_outputs import tensors_in

__all__ = ["Division", "divisions_of", "starts_of_documents"]


@dataclass(frozen=True)
class Division:
    """Parts of a micro-batch along one dimension of its outputs.

    >>> documents = Division(dim=1, size=6, starts=(0, 2))
    >>> documents.number, documents.places([1]).tolist()
    (2, [2, 3, 4, 5])
    >>> two_rows_time_first = Division(dim=0, size=6, flattened=(2, 1))
    >>> two_rows_time_first.number, two_rows_time_first.places([1]).tolist()
    (2, [1, 3, 5])
    """

    dim: int
    size: int
    """Length of the dimension."""
    starts: tuple[int, ...] | None = None
    """Where each document starts; None where each place is a part of its own."""
    flattened: tuple[int, int] | None = None
    """Where the outputs have rows and times in one dimension: how many rows there are, and in which of their
    first two dimensions the inputs have them. None where that is not so.
    """

    @property
    def number(self) -> int:
        """How many parts there are."""
        return self.length if self.starts is None else len(self.starts)

    @property
    def length(self) -> int:
        """Of the dimension in which the inputs have the parts."""
        return self.size if self.flattened is None else self.flattened[0]

    def to_take(self, fraction: float) -> int | None:
        """How many parts are that fraction of them, at least one; None where nothing is left out."""
        number = max(1, int(fraction * self.number))
        return number if fraction < 1 and number < self.number else None

    def places(self, parts: Sequence[int]) -> Tensor:
        """The places of some parts, ``(n,)``."""
        if self.flattened is not None:
            return torch.isin(self._rows(), torch.tensor(parts, device="cpu")).nonzero().squeeze(1)
        if self.starts is None:
            return torch.tensor(parts)
        ends = (*self.starts[1:], self.size)
        return torch.cat([torch.arange(self.starts[part], ends[part]) for part in parts])

    def counting(self, masks: Sequence[Tensor]) -> list[bool]:
        """For each part, whether a prediction of it counts. Masks have the shape of the predictions."""
        along = [mask.movedim(self.dim, 0).reshape(self.size, -1).any(1).cpu() for mask in masks]
        each = torch.stack(along).any(0)
        if self.flattened is not None:
            counts = torch.zeros(self.number, device="cpu").index_add_(0, self._rows(), each.float())
            return counts.bool().tolist()
        if self.starts is None:
            return each.tolist()
        ends = (*self.starts[1:], self.size)
        return [bool(each[start:end].any()) for start, end in zip(self.starts, ends, strict=True)]

    def of_output(self, tensor: Tensor, places: Tensor) -> Tensor:
        """These places of an output, or of a mask of its predictions."""
        return tensor.index_select(self.dim, places.to(tensor.device))

    def of_inputs(self, value: Any, places: Tensor) -> Any:
        """These places of every tensor, nested in any way, that has as many of them."""
        if isinstance(value, Tensor):
            if self.starts is not None and _are_ends(value, self.size):
                return _ends_of_places(value, places)
            chosen = places if self.flattened is None else torch.unique(self._rows()[places.cpu()])
            for dim in self._dims(value):
                value = value.index_select(dim, chosen.to(value.device))
            return value
        if type(value) is dict:
            return {key: self.of_inputs(item, places) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.of_inputs(item, places) for item in value)
        return value

    def _dims(self, tensor: Tensor) -> list[int]:
        if self.starts is not None:  # a mask (1, 1, T, T) has the row twice
            return [d for d, n in enumerate(tensor.shape) if n == self.size and (d or tensor.ndim == 1)]
        dim = self.dim if self.flattened is None else self.flattened[1]
        if tensor.ndim > dim and tensor.shape[dim] == self.length:
            return [dim]
        # One number a row, as lengths, beside tensors with time as the first dimension.
        return [0] if tensor.ndim and tensor.shape[0] == self.length else []

    def _rows(self) -> Tensor:
        """The row of each place of flattened outputs."""
        assert self.flattened is not None
        number, dim = self.flattened
        places = torch.arange(self.size, device="cpu")
        return places % number if dim else places // (self.size // number)


def divisions_of(
    shapes: Sequence[torch.Size], inputs: tuple[tuple[Any, ...], Mapping[str, Any]], batch_dim: int | None
) -> list[Division]:
    """The ways in which a micro-batch may be divided, the most likely one first; two at most.

    >>> rows = divisions_of([torch.Size([12])], ((torch.zeros(4, 3),), {}), None)
    >>> [division.flattened for division in rows]
    [(4, 0), (3, 1)]

    Args:
        shapes: of the predictions of each output, ``(B, T)`` for logits ``(B, T, V)``.
        inputs: of the forward, args and kwargs: they tell the documents of a packed row.
        batch_dim: the dimension of the rows; None: the first, or else the second (time as the first one).
    """

    def common(dim: int) -> int:
        sizes = {shape[dim] if len(shape) > dim else 0 for shape in shapes}
        return sizes.pop() if len(sizes) == 1 else 0

    if batch_dim is not None:
        found = [Division(batch_dim, common(batch_dim))]
    elif common(0) == 1 and (starts := starts_of_documents(inputs, common(1))) is not None:
        found = [Division(1, common(1), starts)]
    elif all(len(shape) == 1 for shape in shapes) and (sides := _flattened(inputs, common(0))) is not None:
        found = [Division(0, common(0), flattened=(rows, dim)) for dim, rows in enumerate(sides)]
    else:
        found = [Division(0, common(0)), Division(1, common(1))]
    return [division for division in found if division.number > 1]


def _flattened(inputs: Any, size: int) -> tuple[int, int] | None:
    """The first two dimensions of an input that has ``size`` places in them together, unless one has as many
    in its first: then a place is a row.
    """
    shapes = [tensor.shape for tensor in tensors_in(inputs)]
    if any(shape[:1] == (size,) for shape in shapes):
        return None
    return next(((s[0], s[1]) for s in shapes if len(s) > 1 and s[0] * s[1] == size), None)


def starts_of_documents(inputs: Any, length: int) -> tuple[int, ...] | None:
    """Where the documents of a packed row ``(1, length)`` start; None if no input tells two of them.

    Told by positions that start anew, 0 1 2 0 1, or by numbers of documents, 0 0 0 1 1, whatever they are
    called.

    >>> starts_of_documents({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, 5)
    (0, 3)
    """
    for tensor in _integers(inputs, length):
        row = tensor.reshape(-1)
        steps = row.diff()
        positions = bool((row[0] == 0) & ((steps == 1) | (row[1:] == 0)).all())
        numbers = bool(((steps == 0) | (steps == 1)).all())
        first = (row == 0) if positions else torch.nn.functional.pad(steps, (1, 0), value=1) != 0
        starts = first.nonzero().flatten().tolist()
        if (positions or numbers) and 1 < len(starts) < length:
            return tuple(starts)
    return None


def _are_ends(tensor: Tensor, length: int) -> bool:
    """Whether it holds the ends of the documents of a packed row, 0 among them (``cu_seqlens``)."""
    if tensor.ndim != 1 or len(tensor) < 2 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    return bool((tensor[0] == 0) & (tensor[-1] == length) & (tensor.diff() >= 0).all())


def _ends_of_places(ends: Tensor, places: Tensor) -> Tensor:
    """The ends of the documents that are left of a packed row.

    >>> _ends_of_places(torch.tensor([0, 2, 3, 6]), torch.tensor([0, 1, 3, 4, 5])).tolist()
    [0, 2, 5]
    """
    # A kernel that is told ends beyond what it is given reads memory that is not there.
    left = torch.bucketize(ends, places.to(ends)).to(ends.dtype)
    return torch.cat([left[:1], left[1:][left.diff() > 0]])


def _integers(value: Any, length: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        whole = not value.is_floating_point() and value.dtype != torch.bool
        if whole and length > 1 and tuple(value.shape) in ((1, length), (length,)):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _integers(item, length)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _integers(item, length)
