"""Hutchinson's estimator of the diagonal of the Hessian: u * (H u) for a random probe u (Algorithm 1).

    E[u_i (H u)_i] = sum_j H_ij E[u_i u_j] = H_ii      whenever E u u^T = I.

Unbiased for the Hessian itself, which may be negative (the update then falls back to the sign of m). H u is
the gradient of <grad L, u>: exact, by a second backward through the first. The graph of the first exists
inside the pass only; a user never writes ``create_graph``. Rademacher probes (+1 or -1) have the smaller
variance, none at all if H is diagonal; the paper draws Gaussian ones.

Source: arXiv 2305.14342v4, Algorithm 1; Hutchinson 1989; Bekas, Kokiopoulou, Saad 2007.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.curvature.estimate import Diagonals, Estimate, Estimator, PassByHand, PassContext
from sophia.curvature.graph_nodes import nodes_of

__all__ = ["Hutchinson"]


class Hutchinson(Estimator):
    """Unbiased for the diagonal of the Hessian of the training loss; needs the loss, not only logits.

    Args:
        distribution: of the probe, "rademacher" or "gaussian" (the paper's).
        loss_fn: ``loss_fn(output, args, kwargs) -> scalar``, the *mean* loss of one micro-batch from what the
            model returned and what it was called with. By default the loss is looked for in the output
            (``.loss``, ``["loss"]`` or a 0-dim tensor in a tuple).
    """

    signed = True
    needs_outputs = False
    differentiates_twice = True

    def __init__(
        self,
        *,
        distribution: str = "rademacher",
        loss_fn: Callable[[Any, tuple[Any, ...], Any], Tensor] | None = None,
    ) -> None:
        if distribution not in ("rademacher", "gaussian"):
            raise ValueError(f"distribution={distribution!r} is unknown: give 'rademacher' or 'gaussian'")
        self.distribution, self.loss_fn = distribution, loss_fn

    def estimate(self, context: PassContext) -> Estimate:
        """Return ``u * (H u)``, H the Hessian of the loss averaged over all counted predictions."""
        handle = _ProbePass(self.distribution, context)
        for batch in context.micro_batches:
            # Fused attention kernels have no second derivative; the plain one does. Inside the pass only.
            with sdpa_kernel(SDPBackend.MATH):
                output = batch.forward()
                loss = (
                    batch.loss(output)
                    if self.loss_fn is None
                    else self.loss_fn(output, batch.args, batch.kwargs)
                )
                handle.add(loss, batch.count)
        return handle.finish(context.count)

    def by_hand(self, context: PassContext) -> PassByHand:
        """Return the handle with ``add(loss, count)``; build the loss under
        ``sdpa_kernel(SDPBackend.MATH)``.
        """
        return _ProbePass(self.distribution, context)


class _ProbePass(PassByHand):
    def __init__(self, distribution: str, context: PassContext) -> None:
        self._context = context
        generator = context.shared_generator("probe")
        self._probe = [_probe(p, distribution, generator) for p in context.parameters]
        self._product: Diagonals = [None] * len(self._probe)
        self._count = 0

    def add(self, loss: Tensor, count: int) -> None:
        """Add ``count`` times the Hessian-vector product of the mean ``loss`` of one micro-batch."""
        if count == 0:  # a mean over nothing is NaN
            return
        self._count += count
        try:
            products = hessian_vector_product(loss, self._context.parameters, self._probe)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(_of_one_order(str(error).splitlines()[0])) from error
        for i, product in enumerate(products):
            if product is not None:
                before = self._product[i]
                self._product[i] = product * count if before is None else before.add_(product, alpha=count)

    def finish(self, count: float | None = None) -> Estimate:
        total = self._context.count_over_ranks(self._count) if count is None else count
        summed = self._context.sum_over_ranks(self._product)
        diagonal: Diagonals = [
            None if hu is None else (hu.to(torch.promote_types(hu.dtype, torch.float32)) * (u / total))
            for hu, u in zip(summed, self._probe, strict=True)
        ]
        return Estimate(diagonal, total)


def hessian_vector_product(loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Diagonals:
    """``H v`` for the Hessian of a scalar ``loss``; None for parameters that the product does not reach.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_vector_product((x**3).sum(), [x], [torch.ones(2)])      # H = diag(6 x)
    [tensor([ 6., 12.])]
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    _check_differentiable([g.grad_fn for g in gradients if g is not None])
    pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [None] * len(gradients)  # the loss is linear in all of them
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True))


def _check_differentiable(roots: Sequence[Any]) -> None:
    """Raise RuntimeError where the backward went through a function that is marked as once differentiable.

    Autograd does not: it sees no way from there to a parameter, and leaves that part of the Hessian out.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes_of(roots)):
        raise RuntimeError("trying to differentiate twice a function that is marked as once differentiable")


def _of_one_order(cause: str) -> str:
    return (
        "Hutchinson's estimator differentiates the backward of the loss once more, and a part of it could "
        f"not be ({cause}). Fused kernels have a backward of one order: a fused output layer, flash "
        "attention, most autograd functions of one's own. Let the model run its plain operations, or take "
        "estimator='gnb', which needs one backward"
    )


def _probe(parameter: Tensor, distribution: str, generator: torch.Generator) -> Tensor:
    u = torch.empty_like(parameter, requires_grad=False)
    if distribution == "gaussian":
        return u.normal_(generator=generator)
    return u.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
