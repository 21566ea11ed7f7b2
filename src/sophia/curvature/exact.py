"""Exact diagonals for tiny models: the oracle that every estimator is held to.

Full Jacobians and Hessians by ``torch.func``: memory grows with parameters times outputs, or with the square
of the parameters. Use float64 and models of a few hundred parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sophia.likelihoods import Likelihood

__all__ = ["gauss_newton_diagonal", "hessian_diagonal"]


def gauss_newton_diagonal(
    outputs_of: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    *,
    likelihood: Likelihood,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """``diag of sum_b w_b J_b^T S_b J_b`` over the B counted predictions, by name of the parameter.

    Args:
        outputs_of: the model's outputs, e.g. logits ``(B, T, V)``, as a function of its parameters
            (``torch.func.functional_call``).
        parameters: where to take it.
        likelihood: gives S_b, the exact curvature in the outputs.
        mask: bool, one entry a prediction; all count by default.
        weights: what each prediction weighs in the loss, of the shape of the mask; 1 / B by default, a mean.

    >>> from sophia.likelihoods import Categorical
    >>> x = torch.tensor([1.0, 2.0])
    >>> at = {"w": torch.zeros(2, 2)}
    >>> gauss_newton_diagonal(lambda p: (p["w"] @ x)[None], at, likelihood=Categorical())["w"]
    tensor([[0.2500, 1.0000],
            [0.2500, 1.0000]])
    """
    point = {name: p.detach() for name, p in parameters.items()}
    shape = likelihood.prediction_shape(outputs_of(point))
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else mask

    def counted(p: dict[str, Tensor]) -> Tensor:
        return outputs_of(p)[keep]

    outputs = counted(point)
    jacobians = torch.func.jacrev(counted)(point)
    n = outputs.shape[0]
    curvature = likelihood.output_curvature(outputs).reshape(n, *([outputs[0].numel()] * 2))
    weighing = curvature.new_full((n,), 1 / n) if weights is None else weights[keep].to(curvature)
    curvature = curvature * weighing.view(n, 1, 1)
    return {
        name: torch.einsum("nip,nij,njp->p", j, curvature, j).reshape(point[name].shape)
        for name, j in ((name, j.reshape(n, outputs[0].numel(), -1)) for name, j in jacobians.items())
    }


def hessian_diagonal(
    loss_of: Callable[[dict[str, Tensor]], Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Diagonal of the Hessian of a scalar loss, by name of the parameter.

    >>> hessian_diagonal(lambda p: (p["x"] ** 3).sum(), {"x": torch.tensor([1.0, 2.0])})["x"]
    tensor([ 6., 12.])
    """
    point = {name: p.detach() for name, p in parameters.items()}
    hessian = torch.func.hessian(loss_of)(point)
    return {
        name: hessian[name][name].reshape(p.numel(), p.numel()).diagonal().reshape(p.shape)
        for name, p in point.items()
    }
