"""Labels drawn from a softmax by inverting its cumulative distribution, in chunks of rows, with a gradient
that is told by its few entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Contrast", "at_least_float32", "chunks", "counted_rows", "fine", "inverse_cdf", "rows_per_chunk"]

# Logits entries per chunk. On a CPU 4 MB of float32, which stay in a core's cache between the passes over
# them (a quarter of the time of 16 MB); elsewhere few launches count for more.
CHUNK = {"cpu": 2**20}
CHUNK_ELSEWHERE = 2**24


@dataclass(frozen=True)
class Contrast:
    """A gradient in the logits that is not zero in a few classes of each prediction only."""

    rows: Tensor | None
    """Which predictions, as numbers of rows of the flattened logits ``(N, V)``; None for all, in order."""
    labels: Tensor
    """Classes, ``(n, 2 pairs)``; one may come twice."""
    values: Tensor
    """Their gradients, ``(n, 2 pairs)``, to be added up."""

    def times(self, factors: Tensor) -> Contrast:
        """With a factor for each prediction of the flattened outputs, ``(N,)``."""
        own = factors if self.rows is None else factors[self.rows]
        return Contrast(self.rows, self.labels, self.values * own[:, None].to(self.values.dtype))

    def is_zero(self) -> bool:
        """Whether all pairs are of equal labels, which cancel."""
        return not bool((self.labels[:, ::2] != self.labels[:, 1::2]).any())

    def dense(self, outputs: Tensor) -> Tensor:
        """The same as a tensor like ``outputs``."""
        gradient = torch.zeros_like(outputs, memory_format=torch.contiguous_format)
        flat, values = gradient.view(-1, outputs.shape[-1]), self.values.to(outputs.dtype)
        if self.rows is None:
            flat.scatter_add_(1, self.labels, values)
        else:
            flat.index_put_((self.rows[:, None], self.labels), values, accumulate=True)
        return gradient


def inverse_cdf(probabilities: Tensor, uniforms: Tensor, *, block: int = 64) -> Tensor:
    """Draw classes by inverting the cumulative distribution, in two levels: ``(n, V), (n, k) -> (n, k)``.

    One uniform number a draw instead of one exponential a logit, which is what makes ``multinomial`` and the
    Gumbel trick ten times slower on a CPU. First the block of 64 classes is found from the sums of the
    blocks, then the class inside it. The sums are float64 where the device has it: one float32 cumulative sum
    over a vocabulary cannot reach classes of probability below about 6e-8. NaN goes in, some index comes out,
    and no error. Uniforms ``(n,)`` give classes ``(n,)``.

    >>> inverse_cdf(torch.tensor([[0.1, 0.2, 0.7]]), torch.tensor([[0.05, 0.25, 0.99]]))
    tensor([[0, 1, 2]])
    """
    if uniforms.ndim == 1:
        return inverse_cdf(probabilities, uniforms[:, None], block=block)[:, 0]
    n, classes = probabilities.shape
    wide = fine(probabilities)
    whole = classes // block * block
    sums = probabilities[:, :whole].view(n, -1, block).sum(-1, dtype=wide)
    if whole < classes:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True, dtype=wide)], 1)
    edges = sums.cumsum_(1)
    # Scaling by the total makes rounding of the softmax harmless; the clamps catch u * total == total.
    target = uniforms.to(wide) * edges[:, -1:]
    which = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    below = torch.where(which > 0, edges.gather(1, (which - 1).clamp_(min=0)), edges.new_zeros(()))
    index = which[..., None] * block + torch.arange(block, device=probabilities.device)
    inside = probabilities.gather(1, index.clamp(max=classes - 1).view(n, -1)).view(index.shape)
    inside = inside.to(wide).masked_fill_(index >= classes, 0).cumsum_(-1)
    offset = torch.searchsorted(inside, (target - below)[..., None], right=True)[..., 0]
    return (which * block + offset.clamp_(max=block - 1)).clamp_(max=classes - 1)


def counted_rows(outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """The logits as ``(N, V)``, the numbers of the rows that count (None for all), and how many they are."""
    logits, counted = outputs.detach().reshape(-1, outputs.shape[-1]), mask.reshape(-1)
    if bool(counted.all()):
        return logits, None, logits.shape[0]
    rows = counted.nonzero().squeeze(1)
    return logits, rows, rows.shape[0]


def rows_per_chunk(logits: Tensor) -> int:
    """How many rows of logits ``(N, V)`` to take at a time."""
    return max(1, CHUNK.get(logits.device.type, CHUNK_ELSEWHERE) // max(1, logits.shape[-1]))


def chunks(logits: Tensor, rows: Tensor | None, n: int) -> Iterator[tuple[Any, slice]]:
    """Parts of the rows that count: what picks them out of the logits, and out of a list of them alone."""
    size = rows_per_chunk(logits)
    for start in range(0, n, size):
        chunk = slice(start, min(start + size, n))
        yield (chunk if rows is None else rows[chunk]), chunk


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """In which a softmax is taken."""
    return torch.promote_types(tensor.dtype, torch.float32)


def fine(tensor: Tensor) -> torch.dtype:
    """In which probabilities are added up: float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
