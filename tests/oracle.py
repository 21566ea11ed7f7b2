"""Exact diagonal of the Gauss-Newton matrix of the loss that a loop really trains, whatever its reduction.

For outputs z of all the forwards of a step and a loss L(z) of them, weights, sums and divisions included,

    h = diag(J^T S J),    J = dz / dtheta,    S = d^2 L / dz dz,

in float64, row by row of J and S by autograd: no part of the library, and nothing that it assumes (no mean,
no independent predictions, no count). For a cross-entropy weighted with w_b, S has the blocks
w_b (diag(p_b) - p_b p_b^T), free of the labels. Memory grows with outputs times parameters and the square of
the outputs: a thousand outputs, a few hundred parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["double", "gauss_newton"]


def double(data: Any) -> Any:
    """The same nested data with its floating tensors in float64."""
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, data)


def gauss_newton(
    model: nn.Module,
    data: Any,
    outputs_of: Callable[[nn.Module, Any], Any],
    loss_of: Callable[[Any, Any], Tensor],
) -> dict[str, Tensor]:
    """``diag(J^T S J)`` by name of the parameter, zero where the loss does not reach.

    Args:
        model: copied, and run in float64 in the mode in which it is.
        data: what the two functions need, nested; floating tensors are given in float64.
        outputs_of: ``(model, data) -> outputs``: all forwards of a step, nested in any way.
        loss_of: ``(outputs, data) -> loss``: all that a step sums into ``.grad``.
    """
    model, data = copy.deepcopy(model).double(), double(data)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves, form = tree_flatten(outputs_of(model, data))
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    z = torch.cat([leaves[i].flatten() for i in moving])

    point = z.detach().requires_grad_()
    parts = point.split([leaves[i].numel() for i in moving])
    free = list(leaves)
    for i, part in zip(moving, parts, strict=True):
        free[i] = part.view(leaves[i].shape)
    (slope,) = torch.autograd.grad(loss_of(tree_unflatten(free, form), data), point, create_graph=True)
    curvature = _rows(slope, [point])
    jacobian = _rows(z, list(named.values()))
    diagonal = (jacobian * (curvature @ jacobian)).sum(0)
    sizes = [p.numel() for p in named.values()]
    return {
        name: part.view(p.shape) for (name, p), part in zip(named.items(), diagonal.split(sizes), strict=True)
    }


def _rows(values: Tensor, inputs: list[Tensor]) -> Tensor:
    """Jacobian of a vector, ``(values, all inputs together)``; zero where there is no way."""
    if not values.requires_grad:
        return values.new_zeros(values.numel(), sum(i.numel() for i in inputs))
    rows = [
        torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) for value in values.unbind()
    ]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(i) if g is None else g).flatten()
                    for g, i in zip(row, inputs, strict=True)
                ]
            )
            for row in rows
        ]
    )
