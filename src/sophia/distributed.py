"""Sums over the ranks of a process group; without one, nothing happens here.

Every decision of a refresh (due, skip, scale) is taken from values that are equal on all ranks: an exception
or a branch on one rank alone would leave the others waiting in a collective.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["any_rank", "rank", "sum_count", "sum_tensors", "world_size"]


def world_size(group: Any) -> int:
    """Ranks that share the parameters: 1 without an initialised process group, or with
    ``process_group=False``.
    """
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def rank(group: Any) -> int:
    """Number of this process in the group, 0 without one."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def sum_count(count: int, device: torch.device, group: Any) -> float:
    """The number of counted predictions over all ranks."""
    if world_size(group) == 1:
        return float(count)
    total = torch.tensor([float(count)], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return float(total.item())


def any_rank(flag: bool, device: torch.device, group: Any) -> bool:
    """Whether the flag is set on any rank."""
    if world_size(group) == 1:
        return flag
    seen = torch.tensor([float(flag)], device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    return bool(seen.item() > 0)


def sum_tensors(tensors: list[Tensor | None], parameters: list[Tensor], group: Any) -> list[Tensor | None]:
    """Add up over the ranks, one collective for all; a tensor that one rank lacks counts as zero there."""
    if world_size(group) == 1:
        return tensors
    full = [
        torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if t is None else t
        for t, p in zip(tensors, parameters, strict=True)
    ]
    flat = torch.cat([t.reshape(-1).to(full[0].device) for t in full])
    dist.all_reduce(flat, group=group)
    return [
        part.view_as(t).to(t.device)
        for part, t in zip(torch.split(flat, [t.numel() for t in full]), full, strict=True)
    ]
