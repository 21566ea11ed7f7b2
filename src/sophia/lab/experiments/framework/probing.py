"""One estimate of the curvature of a language model, by the estimators that the optimizer uses."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.curvature import Estimator, GaussNewtonBartlett, PassContext
from sophia.refresh.seeds import generator

__all__ = ["estimate", "mean_estimate"]


def estimate(estimator: Estimator, model: nn.Module, ids: Tensor, *, seed: int) -> list[Tensor]:
    """One draw over the next-token predictions of ``ids`` (sequences, context), a tensor a parameter.

    The model's gradients must be None, and are so afterwards. Parameters that the loss does not reach have
    zeros.
    """
    parameters = list(model.parameters())
    context = PassContext(parameters, (), 0.0, partial(generator, parameters[0].device, seed))
    handle = estimator.by_hand(context)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        output = model(input_ids=ids, labels=ids)
        if isinstance(estimator, GaussNewtonBartlett):
            handle.sampled_loss(output.logits[:, :-1]).backward()  # type: ignore[no-untyped-call]
        else:
            handle.add(output.loss, ids[:, 1:].numel())
    diagonal = handle.finish().diagonal
    return [torch.zeros_like(p) if d is None else d for p, d in zip(parameters, diagonal, strict=True)]


def mean_estimate(
    estimator: Estimator, model: nn.Module, ids: Tensor, *, draws: int, seed: int
) -> list[Tensor]:
    """The mean of so many draws, in float64."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for draw in range(draws):
        for sum_, one in zip(total, estimate(estimator, model, ids, seed=seed * 10_000 + draw), strict=True):
            sum_ += one
    return [t / draws for t in total]
