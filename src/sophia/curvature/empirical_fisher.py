"""The empirical Fisher: B times the squared gradient on the *training* labels.

    h_hat = B * ( grad of the mean training loss )^2

It costs what Gauss-Newton-Bartlett costs and looks alike, and it estimates something else: the training
labels are not the model's, their gradients do not average to zero, so the cross terms stay, and near a
minimum it says how noisy the gradient is rather than how curved the loss is. The paper has it among its
ablations (E-F); it is here for that comparison and is never chosen for you.

Source: arXiv 2305.14342v4, ablations; Kunstner, Balles, Hennig, arXiv
1905.12558.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sophia.curvature.estimate import Estimate, Estimator, PassByHand, PassContext, take_gradients

__all__ = ["EmpiricalFisher"]


class EmpiricalFisher(Estimator):
    """Biased for the curvature; for ablations.

    Args:
        loss_fn: as for ``Hutchinson``: the mean loss of a micro-batch, if the model does not return it.
    """

    def __init__(self, *, loss_fn: Callable[[Any, tuple[Any, ...], Any], Tensor] | None = None) -> None:
        self.loss_fn = loss_fn

    def estimate(self, context: PassContext) -> Estimate:
        """Return ``B * (gradient of the mean training loss)^2``."""
        handle = _TrainingLabelPass(context)
        for batch in context.micro_batches:
            output = batch.forward()
            handle.add(
                batch.loss(output)
                if self.loss_fn is None
                else self.loss_fn(output, batch.args, batch.kwargs),
                batch.count,
            )
        return handle.finish(context.count)

    def by_hand(self, context: PassContext) -> PassByHand:
        """Return the handle with ``add(loss, count)``."""
        return _TrainingLabelPass(context)


class _TrainingLabelPass(PassByHand):
    def __init__(self, context: PassContext) -> None:
        self._context, self._count = context, 0

    def add(self, loss: Tensor, count: int) -> None:
        """Back-propagate ``count`` times the mean ``loss`` of one micro-batch."""
        self._count += count
        if count == 0:  # a mean over nothing is NaN; yet other ranks may wait for this backward
            loss = loss.nan_to_num()
        (loss * count).backward()  # type: ignore[no-untyped-call]

    def finish(self, count: float | None = None) -> Estimate:
        total = self._context.count_over_ranks(self._count) if count is None else count
        gradients = self._context.sum_over_ranks(take_gradients(self._context.parameters))
        return Estimate([g if g is None else g.square_().div_(total) for g in gradients], total)
