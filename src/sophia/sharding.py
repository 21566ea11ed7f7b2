"""Which part of a parameter this process holds.

Sophia is element-wise, so the update of a shard needs the shard alone: every kernel runs on plain
local tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

__all__ = ["check_whole", "first_element", "is_dtensor", "laid_out_like", "local"]


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a ``torch.distributed.tensor.DTensor``, without importing that class."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def check_whole(parameter: Tensor, rule: str) -> None:
    """Raise RuntimeError for a shard under a rule that looks at a whole tensor."""
    if rule != "paper" and (is_dtensor(parameter) or getattr(parameter, "_fsdp_flattened", False)):
        raise RuntimeError(
            f"rule={rule!r} takes the rms or the singular values of whole tensors, and this parameter of "
            f"shape {tuple(parameter.shape)} is sharded. Use rule='paper', which is element-wise, or DDP"
        )


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
