"""The exact diagonals of the tiny model, by Jacobians, by second derivatives, by all labels in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.curvature.exact import gauss_newton_diagonal, hessian_diagonal
from sophia.likelihoods import Categorical

__all__ = ["all_labels", "flat", "gauss_newton", "hessian"]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All coordinates in one row, in the order of the model's parameters."""
    return torch.cat([t.reshape(-1) for t in tensors])


def gauss_newton(model: nn.Module, ids: Tensor) -> Tensor:
    """Diagonal of the Gauss-Newton matrix of the mean loss, from Jacobians of the logits."""

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, (), {"input_ids": ids}).logits
        return output[:, :-1]

    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        found = gauss_newton_diagonal(logits, parameters, likelihood=Categorical())
    return flat([found[name] for name in parameters])


def hessian(model: nn.Module, ids: Tensor) -> Tensor:
    """Diagonal of the Hessian of the mean loss, by differentiating twice."""

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": ids, "labels": ids}
        value: Tensor = torch.func.functional_call(model, parameters, (), inputs).loss
        return value

    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        found = hessian_diagonal(loss, parameters)
    return flat([found[name] for name in parameters])


def all_labels(model: nn.Module, ids: Tensor) -> Tensor:
    """What Gauss-Newton-Bartlett samples, with no sampling: every label of every prediction, weighed by its
    probability.

        (1/B) sum_b sum_y p_b(y) (grad -log p_b(y))^2

    One backward for each label of each prediction, by loops and nothing else.
    """
    parameters = list(model.parameters())
    logs = model(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=logs.dtype)
    for row in logs:
        for log_probability in row:
            gradients = torch.autograd.grad(
                -log_probability, parameters, retain_graph=True, materialize_grads=True
            )
            total += log_probability.detach().exp() * flat(gradients) ** 2
    return total / len(logs)
