"""The local part of a sharded parameter (DTensor).

The published rule is element-wise, so the update of a shard needs the shard alone: kernels run on plain local
tensors. What other rules must know of the whole tensor: ``step/whole_tensors.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_element", "is_dtensor", "laid_out_like", "local", "sums_over_shards"]


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a ``torch.distributed.tensor.DTensor``, without importing that class."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def sums_over_shards(parts: Sequence[Tensor], tensors: Sequence[Any]) -> list[Tensor]:
    """From this process's part of a sum over each DTensor the whole sums: a collective for each mesh.

    Args:
        parts: a number for each of ``tensors``, on their device.
        tensors: DTensors, the same on all processes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    alike: dict[tuple[Any, tuple[bool, ...]], list[int]] = {}
    for number, tensor in enumerate(tensors):
        cut = tuple(bool(placement.is_shard()) for placement in tensor.placements)
        alike.setdefault((tensor.device_mesh, cut), []).append(number)
    whole = list(parts)
    for (mesh, cut), numbers in alike.items():
        mine = torch.stack([parts[number] for number in numbers])
        placements = [Partial() if shards else Replicate() for shards in cut]
        sums = DTensor.from_local(mine, mesh, placements, run_check=False).full_tensor()
        for number, total in zip(numbers, sums.unbind(), strict=True):
            whole[number] = total
    return whole


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, as a plain tensor that shares its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def first_element(tensor: Tensor) -> int:
    """Where in the whole tensor, counted row by row, the part begins that this process holds; 0 for a plain
    tensor.
    """
    if not is_dtensor(tensor):
        return 0
    whole: Any = tensor
    return _first_element(tuple(whole.shape), whole.device_mesh, tuple(whole.placements))


@lru_cache(maxsize=4096)
def _first_element(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    first = 0
    for size, offset in zip(shape, offsets, strict=True):
        first = first * size + offset
    return first


def laid_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of ``value`` that belongs with ``local(parameter)``.

    ``value`` may be whole, or a DTensor of any layout on the same mesh. Gathering is a collective; taking a
    part of a whole tensor is not.
    """
    if not is_dtensor(parameter):
        return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
    target: Any = parameter
    if not is_dtensor(value):
        from torch.distributed.tensor import (
            distribute_tensor,
        )  # heavy, and loaded already where there is a DTensor

        whole = value.detach().to(local(parameter).device)
        try:
            return local(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
        except TypeError:  # torch 2.6 sends the first rank's copy instead of cutting each rank's own
            return local(distribute_tensor(whole, target.device_mesh, target.placements))
    given: Any = value
    if given.device_mesh == target.device_mesh and given.placements == target.placements:
        return local(value)
    if given.device_mesh != target.device_mesh:
        return laid_out_like(given.full_tensor(), parameter)
    return local(given.redistribute(target.device_mesh, target.placements))
