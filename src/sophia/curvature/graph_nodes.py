"""Walk through an autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["nodes_of"]


def nodes_of(roots: Iterable[Any], known: set[Any] | None = None, *, end: str = "") -> Iterator[Any]:
    """All nodes that some are made of, these among them, the latest first.

    Args:
        roots: nodes (``tensor.grad_fn``), or None.
        known: nodes beyond which is not gone, and to which all others are added. Holding them also keeps the
            Python object of each the same one.
        end: name of nodes that are given, and beyond which is not gone.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> [node.name() for node in nodes_of([(2 * x).exp().grad_fn])]
    ['ExpBackward0', 'MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    known = set() if known is None else known
    waiting = [root for root in roots if root is not None and root not in known]
    known.update(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        if node.name() == end:
            continue
        for following, _ in reversed(node.next_functions):
            if following is not None and following not in known:
                known.add(following)
                waiting.append(following)
