"""What among the tensors that a model returned is made of what, read from the autograd graph.

The gradient that arrives in a hidden state comes through the logits that are made of it, and a loss or
probabilities that the model returns send theirs through the logits: neither says anything new. A second head
is neither made of the logits, nor are they made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sophia.curvature.graph_nodes import nodes_of

__all__ = ["Kin", "kin_of"]

_Edge = tuple[Any, int]
"""A node and the number of one of its outputs: a tensor, as the graph knows it."""


@dataclass(frozen=True)
class Kin:
    """How one tensor stands to the found outputs and to the other tensors."""

    above: bool
    """Whether a found output is made of it, or is it."""
    below: tuple[int, ...]
    """Numbers of the found outputs that it is made of."""
    parts: tuple[int, ...]
    """Numbers of the other tensors that are made of it."""
    hidden: bool
    """Whether it leaves the same compiled graph, or function of the user's, as a found output: how they
    stand to each other cannot be seen from outside.
    """


def kin_of(found: Sequence[Tensor], others: Sequence[Tensor]) -> list[Kin]:
    """How each of the others stands to the found outputs and to the rest; all have a ``grad_fn``.

    Args:
        found: the outputs that the likelihood speaks of.
        others: tensors that the model returned beside them.
    """
    # One walk through the whole graph. Those that follow end where this one has been: from there no found
    # output can be reached. A node's Python object is held here, so that it stays the same one.
    nodes: set[Any] = set()
    edges = {_edge(t) for t in found if t.grad_fn is not None}
    _walk([node for node, _ in edges], nodes, edges)
    own = [_edge(t) for t in found]
    roots = {node for node, _ in own if node is not None}
    ways = []
    for tensor in others:
        passed: set[_Edge] = set()
        if tensor.grad_fn not in nodes:
            _walk([tensor.grad_fn], set(nodes), passed)
        ways.append(passed)
    return [
        Kin(
            above=_edge(tensor) in edges,
            below=tuple(i for i, edge in enumerate(own) if edge in way and edge != _edge(tensor)),
            parts=tuple(j for j, of in enumerate(ways) if others[j] is not tensor and _edge(tensor) in of),
            hidden=tensor.grad_fn in roots and not tensor.grad_fn.name()[-1:].isdigit(),  # type: ignore[union-attr]
        )
        for tensor, way in zip(others, ways, strict=True)
    ]


def _edge(tensor: Tensor) -> _Edge:
    return tensor.grad_fn, tensor.output_nr


def _walk(starts: Iterable[Any], nodes: set[Any], edges: set[_Edge]) -> None:
    """Add all nodes that these are made of, and the tensors between them, but not beyond known nodes."""
    for node in nodes_of(starts, nodes):
        edges.update(
            (following, number) for following, number in node.next_functions if following is not None
        )
