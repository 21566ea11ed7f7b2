"""Collectives of a refresh over the ranks that train one model.

Every decision of a refresh (due, skip, scale, raise) is taken from values that are equal on all ranks: an
exception or a branch on one rank alone would leave the others waiting in a collective. The collectives of a
refresh are the same on all ranks, in this order: who failed before the pass, are the parameters the same, the
count B, who failed in the pass, which parameters were reached, the sum of the gradients, is the result
finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sophia.distributed.shards import is_dtensor, local
from sophia.distributed.wrappers import Wrapping

__all__ = ["Ranks"]

_BUCKET = 2**25  # elements a collective: 128 MB of float32, instead of a second copy of the model
_SAMPLES = 64  # entries of a parameter that are compared between the ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of one training run, as seen from one of them; without a process group, nothing happens.

    Args:
        data: process groups over which the data differ. A sum over one after the other is the sum over all.
        everyone: these, and the ones that split single tensors: over them decisions are made.
        wrapping: what the wrappers of the model do to gradients.
        device: where small tensors for the collectives live.
    """

    data: tuple[Any, ...]
    everyone: tuple[Any, ...]
    wrapping: Wrapping
    device: torch.device

    @property
    def number(self) -> int:
        """Number of this process among those that see different data, from 0; the key of its noise."""
        number = 0
        for group in self.data:
            number = number * dist.get_world_size(group) + dist.get_rank(group)
        return number

    @property
    def size(self) -> int:
        """How many processes see different data: their gradients are averaged."""
        size = 1
        for group in self.data:
            size *= dist.get_world_size(group)
        return size

    @property
    def divisor(self) -> float:
        """What the wrapper divides the sum of the ranks' gradients by, to leave it in ``.grad``: their
        number, unless a factor of the user's own was read from it.
        """
        read = set(self.wrapping.multipliers.values())
        return read.pop() if len(read) == 1 else float(self.size)

    @property
    def lockstep(self) -> bool:
        """Whether forward and backward themselves wait for other ranks: then one rank cannot leave them
        alone.
        """
        return self.wrapping.lockstep()

    def total(self, count: float) -> float:
        """The number of counted predictions over all ranks."""
        # float64: exact to 2**53 predictions, and float32 is not beyond 2**24.
        counts = torch.tensor([float(count)], dtype=torch.float64)
        return self._reduce(counts, dist.ReduceOp.SUM, self.data)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        seen = torch.tensor([float(flag) for flag in flags], dtype=torch.float64)
        return [value > 0 for value in self._reduce(seen, dist.ReduceOp.MAX, self.everyone)]

    def highest(self, value: float) -> float:
        """The highest of the ranks' values."""
        return self._reduce(torch.tensor([value], dtype=torch.float64), dist.ReduceOp.MAX, self.everyone)[0]

    def agree(self, error: Exception | None, *, mild: type[Exception] | None = None) -> None:
        """Raise on every rank if one has an error: its own there, one that names the rank on the others.

        An error of the type ``mild`` is raised, as that type, on all ranks unless another one is worse.
        """
        if not self.everyone:
            if error is not None:
                raise error
            return
        # One reduction of both kinds: the same number of collectives on every rank, whatever happened to it.
        is_mild = mild is not None and isinstance(error, mild)
        me = float(dist.get_rank() + 1)
        codes = [me if error is not None and not is_mild else 0.0, me if is_mild else 0.0]
        bad, odd = self._reduce(torch.tensor(codes, dtype=torch.float64), dist.ReduceOp.MAX, self.everyone)
        if bad:
            if error is not None and not is_mild:
                raise error
            raise RuntimeError(
                f"the Hessian pass failed on rank {int(bad) - 1}, so this rank stops too: it would wait for "
                "that one forever. The cause is in the message of that rank"
            )
        if odd and mild is not None:
            raise error if error is not None else mild(f"on rank {int(odd) - 1}")

    def together(self, function: Callable[[], T]) -> T:
        """Run a function on every rank; if it raises on one, all raise."""
        try:
            result = function()
        except Exception as error:
            self.agree(error)
            raise
        self.agree(None)
        return result

    def check_same(self, parameters: Sequence[Tensor]) -> None:
        """Raise RuntimeError, on every rank, if parameters that should be copies of each other differ.

        Compared are a few entries of each: enough to tell independent replicas, or the stages of a pipeline,
        from copies, and it costs next to nothing.
        """
        copies = [p for p in parameters if id(p) not in self.wrapping.multipliers and not is_dtensor(p)]
        if not self.data or not copies:
            return
        # Two sums, one weighted by position: permuted parameters have the same plain sum.
        picked = torch.cat([_some(p).to(self.device) for p in copies])
        position = torch.arange(1, len(picked) + 1, dtype=torch.float64, device=picked.device) / len(picked)
        found = torch.stack([(picked * position).nan_to_num().sum(), picked.abs().nan_to_num().sum()]).cpu()
        values = torch.tensor([float(len(picked)), *found.tolist()], dtype=torch.float64)
        high = self._reduce(values, dist.ReduceOp.MAX, self.data)
        low = self._reduce(values, dist.ReduceOp.MIN, self.data)
        if high[0] != low[0] or any(h - m > 1e-5 * high[2] for h, m in zip(high, low, strict=True)):
            raise RuntimeError(
                f"the ranks of this process group hold different parameters (fingerprints from {low[1]:.9g} "
                f"to {high[1]:.9g}): their gradients cannot be summed into one curvature. For independent "
                "runs pass process_group=False; where ranks hold different parts of the model (a pipeline, "
                "tensors split by hand) pass process_group= the ranks that hold the same part"
            )

    def sum_gradients(
        self, gradients: list[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The sum over the ranks of the gradient in each parameter, as local tensors (a shard of a shard).

        What a wrapper has summed is only rescaled. None where no rank has a gradient; where only some have
        one, the others count as zero.
        """
        result: list[Tensor | None] = list(gradients)
        ours: list[int] = []
        for i, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
            multiplier = self.wrapping.multipliers.get(id(parameter))
            if multiplier is None:
                ours.append(i)
            if gradient is None:
                continue
            if is_dtensor(gradient) and multiplier is None:
                # A tensor-parallel layer may leave parts that are still to be added up.
                spec: Any = parameter
                gradient = gradient.redistribute(spec.device_mesh, spec.placements)  # type: ignore[attr-defined]
            piece = local(gradient)
            result[i] = piece if multiplier in (None, 1.0) else piece * multiplier
        if self.data and ours:
            # A rank without a gradient (an expert that got no token) must still take part in the sum.
            reached = torch.tensor([float(result[i] is not None) for i in ours])
            reached_anywhere = self._reduce(reached, dist.ReduceOp.MAX, self.data)
            ours = [i for i, flag in zip(ours, reached_anywhere, strict=True) if flag]
            for i in ours:
                if result[i] is None:
                    like = local(parameters[i])
                    result[i] = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
            self._sum_in_place(result, ours)
        return result

    def _sum_in_place(self, tensors: list[Tensor | None], which: Sequence[int]) -> None:
        for bucket in _buckets([(i, t) for i in which if (t := tensors[i]) is not None]):
            flat = torch.cat([t.detach().reshape(-1) for _, t in bucket])
            home, flat = flat.device, flat.to(self.device)
            with _named():
                for group in self.data:
                    dist.all_reduce(flat, group=group)
            parts = torch.split(flat.to(home), [t.numel() for _, t in bucket])
            for (i, t), part in zip(bucket, parts, strict=True):
                tensors[i] = part.view(t.shape)

    def answers_for(self, parameter: Tensor) -> bool:
        """Whether this rank speaks for the part of the parameter that it holds: each for its shard, the first
        for what all hold.
        """
        split = is_dtensor(parameter) or id(parameter) in self.wrapping.multipliers
        return split or all(dist.get_rank(group) == 0 for group in self.everyone)

    def gather(self, values: Tensor) -> Tensor:
        """The one-dimensional tensors of all ranks, one row each; all of one length."""
        rows = values.to(self.device)[None]
        with _named():
            for group in self.everyone:
                parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, rows.contiguous(), group=group)
                rows = torch.cat(parts)
            return rows.cpu()

    def _reduce(self, values: Tensor, operation: Any, groups: tuple[Any, ...]) -> list[float]:
        if not groups:
            return [float(value) for value in values.tolist()]
        with _named():
            values = values.to(self.device, copy=True)
            for group in groups:
                dist.all_reduce(values, op=operation, group=group)
            return [float(value) for value in values.tolist()]


@contextmanager
def _named() -> Iterator[None]:
    """Say which rank stopped where, and why: a backend's own message is about sockets."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} got no answer from the other ranks during a refresh of the Hessian: "
            "one of them has ended, or waits elsewhere. This rank cannot go on without its part of the "
            "sum. The first message of the rank that ended first has the cause; start again from the last "
            "checkpoint"
        ) from error


def _some(parameter: Tensor) -> Tensor:
    flat = parameter.detach()
    stride = max(1, flat.numel() // _SAMPLES)
    return flat.reshape(-1)[::stride][:_SAMPLES].to(torch.float64)


def _buckets(numbered: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Neighbours of one dtype and device, up to the size of a bucket."""
    bucket: list[tuple[int, Tensor]] = []
    size = 0
    for item in numbered:
        kind = (item[1].dtype, item[1].device)
        if bucket and ((bucket[0][1].dtype, bucket[0][1].device) != kind or size + item[1].numel() > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += item[1].numel()
    if bucket:
        yield bucket
