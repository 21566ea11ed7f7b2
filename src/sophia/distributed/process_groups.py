"""Process groups to reduce over, from the model's wrappers and ``process_group=``.

The collectives themselves are in ``collectives.py``, the reading of wrappers in ``wrappers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sophia.distributed.collectives import Ranks
from sophia.distributed.shards import is_dtensor
from sophia.distributed.wrappers import wrapping_of

__all__ = ["ranks_of"]


def ranks_of(model: nn.Module | None, parameters: Sequence[Tensor], group: Any) -> Ranks:
    """The ranks that train ``parameters``, from the wrappers inside ``model`` and from ``group``.

    Args:
        model: the attached module, None if none is known.
        parameters: all that the optimizer holds.
        group: what the user gave as ``process_group``: None to take the wrapper's ranks, or else the default
            group; False for this process alone; a process group; or a device mesh whose ranks see different
            data.

    Raises:
        RuntimeError: what was given contradicts the wrappers. The same on all ranks.
    """
    wrapping = wrapping_of(model, parameters)
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks((), (), wrapping, torch.device("cpu"))
    strangers = [p for p in parameters if is_dtensor(p) and id(p) not in wrapping.multipliers]
    if group is False:
        data: tuple[Any, ...] = ()
    elif group is not None:
        data = tuple(group.get_all_groups()) if hasattr(group, "get_all_groups") else (group,)
    elif strangers:
        raise RuntimeError(
            f"{len(strangers)} of {len(parameters)} parameters are DTensors that no fully_shard() of "
            f"{type(model).__name__} holds, so it is unknown which ranks see different data. If they are "
            "tensor-parallel, say so: process_group=False where all ranks see the same batch, else the "
            "group (or mesh) of the ranks that do not. If they are sharded, attach the module that "
            "fully_shard() was called on"
        )
    else:
        # Not None, which torch 2.6 refuses where the ranks of a group are asked for.
        data = wrapping.groups or (dist.group.WORLD,)
    for g in data:
        if dist.get_rank(g) < 0:
            raise RuntimeError(
                f"process_group={group!r} does not contain this process (rank {dist.get_rank()}), so there "
                "is nobody to sum its gradients with. Pass the group that it is a member of"
            )
    if wrapping.groups and not _same_ranks(data, wrapping.groups):
        raise RuntimeError(
            f"process_group={group!r} names {_size(data)} ranks, but the model is sharded over "
            f"{_size(wrapping.groups)}, or over others, and its backward sums over those whatever is said "
            "here. Leave process_group out"
        )
    data = tuple(g for g in data if dist.get_world_size(g) > 1)
    everyone = {tuple(dist.get_process_group_ranks(g)): g for g in data}
    for parameter in parameters:
        if is_dtensor(parameter):
            mesh: Any = parameter
            for g in mesh.device_mesh.get_all_groups():
                if dist.get_world_size(g) > 1:
                    everyone.setdefault(tuple(dist.get_process_group_ranks(g)), g)
    return Ranks(data, tuple(everyone.values()), wrapping, _device_of(data, parameters))


def _same_ranks(given: Sequence[Any], wrapped: Sequence[Any]) -> bool:
    """Whether two ways to walk over the ranks reach the same; one may be the other's mesh made flat."""
    mine, theirs = (
        {rank for g in groups for rank in dist.get_process_group_ranks(g)} for groups in (given, wrapped)
    )
    return _size(given) == _size(wrapped) and (theirs <= mine or mine <= theirs)


def _size(groups: Sequence[Any]) -> int:
    return math.prod(dist.get_world_size(group) for group in groups)


def _device_of(groups: Sequence[Any], parameters: Sequence[Tensor]) -> torch.device:
    """Where collectives may run: beside the parameters, but on the accelerator if the CPU has no backend."""
    home = parameters[0].device
    if home.type == "cpu" and groups and "cpu" not in str(dist.get_backend_config(groups[0])):
        accelerator = torch.accelerator.current_accelerator()
        return home if accelerator is None else accelerator
    return home
