"""Predictions inside a model that returns its loss and no logits, found in the autograd graph of the loss.

The graph of a cross-entropy passes a node of ``log_softmax``, which has kept its result for the backward: the
log-probabilities, which are logits of the same softmax. The gradient that comes out of that node is the
loss's gradient in the logits, and an edge leads from it to what they were made of. So such a model is read
and run again as one that returns logits: whatever it shifts, flattens, casts, caps or leaves out before its
loss has happened on the way to that node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sophia.curvature.graph_nodes import nodes_of
from sophia.likelihoods import Bernoulli, Categorical, Distillation, Gaussian, Head
from sophia.refresh.eager import eager
from sophia.refresh.model_outputs import tensors_in
from sophia.refresh.places import fields

__all__ = [
    "Inside",
    "LossGraph",
    "backward",
    "found_inside",
    "is_compiled",
    "is_made_of_losses",
    "other_losses",
]

_NODES = (
    (Categorical, "LogSoftmaxBackward0", "_saved_result"),
    (Bernoulli, "BinaryCrossEntropyWithLogitsBackward0", "_saved_self"),
    (Gaussian, "MseLossBackward0", "_saved_self"),
)
"""By likelihood, the node of its loss, and where it keeps the outputs that the likelihood speaks of."""
_LOSSES = ("NllLoss", "BinaryCrossEntropyWithLogits", "MseLoss")
_OTHERS = ("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy")
_NEAR = 4  # nodes between a loss for each prediction and what is returned of it
_FAR = 16  # nodes between a loss and the flattening of its logits


@dataclass(frozen=True)
class Inside:
    """One tensor of predictions inside a model."""

    node: Any
    """Of the loss, in the graph."""
    values: Tensor
    """As the likelihood wants them, classes last, without a graph."""
    classes: int
    """The dimension of the classes in the node's own tensor."""
    own: torch.Size
    """The shape of that, with the classes moved to the end."""

    def as_output(self) -> Tensor:
        """The same values, as a tensor from which a backward enters the graph where the loss would."""
        anchor = torch.zeros((), device=self.values.device, requires_grad=True)
        return _Entry.apply(self.values, anchor, self)  # type: ignore[no-any-return, no-untyped-call]

    def listen(self, listener: Callable[[Tensor], None]) -> None:
        """Hand the loss's gradient in the predictions on, in their shape."""
        # Not self: the node would keep its own result, and the graph, alive.
        shape, classes = self.values.shape, self.classes

        @untraced
        def hook(inputs: tuple[Tensor | None, ...], _: Any) -> None:
            if inputs and inputs[0] is not None:
                listener(inputs[0].movedim(classes, -1).reshape(shape))

        self.node.register_hook(hook)

    def as_predictions(self, gradient: Tensor) -> Tensor:
        """A gradient at the edge, in the shape of the predictions."""
        return gradient.movedim(self.classes, -1).reshape(self.values.shape)

    def entered(self, gradient: Tensor) -> tuple[GradientEdge, Tensor]:
        """Where, and with what, the backward of a gradient in the predictions begins."""
        return self.edge, gradient.reshape(self.own).movedim(-1, self.classes)

    @property
    def edge(self) -> GradientEdge:
        """Between the predictions and what they are made of."""
        return GradientEdge(*self.node.next_functions[0])


@dataclass(frozen=True)
class LossGraph:
    """Predictions inside the graph of what the model returns."""

    head: Head
    kept: tuple[int, ...] | None = None
    """Numbers of those that are predictions; None for all."""

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, a forward shows its graph: outside of compiled ones."""
        with eager():
            yield

    def find(self, output: Any) -> tuple[Tensor, ...]:
        """The predictions of a forward, from what it returned."""
        inside = found_inside(tensors_in(fields(output)), self.head)
        numbers = range(len(inside)) if self.kept is None else self.kept
        return tuple(inside[number].as_output() for number in numbers if number < len(inside))


def found_inside(tensors: Iterable[Tensor], head: Head) -> list[Inside]:
    """The predictions that returned tensors were made of by a loss of the likelihood, in the order of the
    graph; none where the graph does not show it: a compiled one, or a function of the user's.
    """
    name, kept = _node_of(head)
    if not name or isinstance(head.likelihood, Distillation):
        return []  # a teacher's loss has two softmaxes of one prediction
    found: list[Inside] = []
    for node in nodes_of((t.grad_fn for t in tensors), end=name):
        if node.name() == name and node.next_functions[0][0] is not None:
            found.append(_inside(node, kept, head.likelihood.event_dims))
    return found


def _node_of(head: Head) -> tuple[str, str]:
    """The name of the node of a head's loss, and where that keeps the outputs; empty if there is none."""
    return next(((name, kept) for of, name, kept in _NODES if isinstance(head.likelihood, of)), ("", ""))


def other_losses(tensors: Iterable[Tensor], head: Head) -> list[str]:
    """Names of losses of another kind that returned tensors were made of, beside that of the head."""
    mine, _ = _node_of(head)
    names = {node.name() for node in nodes_of((t.grad_fn for t in tensors), end=mine)}
    found = (name.removesuffix("Backward0") for name in sorted(names) if name != mine)
    return [name for name in found if name.startswith(_OTHERS)]


def is_compiled(tensors: Iterable[Tensor]) -> bool:
    """Whether a compiled graph is anywhere in that of these tensors."""
    return any(node.name().startswith("CompiledFunction") for node in nodes_of(t.grad_fn for t in tensors))


def _inside(node: Any, kept: str, event_dims: int) -> Inside:
    values = getattr(node, kept).detach()
    classes = values.ndim - 1
    if event_dims:
        dim = node._saved_dim  # a negative one is kept as an unsigned number
        classes = (dim - 2**64 if dim >= 2**63 else dim) % values.ndim
        values = values.movedim(classes, -1)
    return Inside(node, values.reshape(_unflattened(node, values, event_dims)), classes, values.shape)


def _unflattened(node: Any, values: Tensor, event_dims: int) -> torch.Size:
    """The shape that the predictions had before they were flattened for the loss: of it one sees the rows."""
    shape = values.shape
    if values.ndim != 1 + event_dims:
        return shape
    for _ in range(_FAR):
        onward = [
            n for n, _ in node.next_functions if n is not None and not n.name().endswith("AccumulateGrad")
        ]
        if len(onward) != 1:
            return shape
        (node,) = onward
        before = getattr(node, "_saved_self_sym_sizes", None)
        if before is None or ("View" not in node.name() and "Reshape" not in node.name()):
            continue
        size = torch.Size(int(n) for n in before)
        if (
            size.numel() == values.numel()
            and size[len(size) - event_dims :] == shape[len(shape) - event_dims :]
        ):
            return size if len(size) > values.ndim else shape
        return shape
    return shape


def is_made_of_losses(tensor: Tensor) -> bool:
    """Whether a tensor is a loss for each prediction, but for its shape and factors: no logits."""
    node: Any = tensor.grad_fn
    for _ in range(_NEAR):
        if node is None:
            return False
        if node.name().startswith(_LOSSES):
            return True
        onward = [n for n, _ in node.next_functions if n is not None]
        if len(onward) != 1:
            return False
        (node,) = onward
    return False


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """``torch.autograd.backward``, in one go where some of the roots are `Inside.as_output`."""
    nodes = [root.grad_fn for root in roots]
    if not any(hasattr(node, "inside") for node in nodes):
        torch.autograd.backward(list(roots), list(gradients))
        return
    pairs = []
    for root, node, gradient in zip(roots, nodes, gradients, strict=True):
        gradient = torch.ones_like(root) if gradient is None else gradient
        inside = getattr(node, "inside", None)
        pairs.append((get_gradient_edge(root), gradient) if inside is None else inside.entered(gradient))
    torch.autograd.backward([edge for edge, _ in pairs], [gradient for _, gradient in pairs])


class _Entry(torch.autograd.Function):
    """The identity on values, whose backward goes on from an edge of another graph.

    That is a backward inside of a backward, as reentrant checkpointing runs it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor, inside: Inside) -> Tensor:
        ctx.inside = inside
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        edge, gradient = ctx.inside.entered(gradients[0])
        torch.autograd.backward([edge], [gradient], retain_graph=True)  # others may follow
        return None, None, None
