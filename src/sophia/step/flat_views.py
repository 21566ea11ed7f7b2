"""Dense tensors as flat views, in the order of their addresses."""

from __future__ import annotations

from torch import Tensor

__all__ = ["flat", "is_dense"]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their span of memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, ``(n,)``, as a view that autograd does not see.

    For dense tensors of equal strides this pairs the same coordinates.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,))
