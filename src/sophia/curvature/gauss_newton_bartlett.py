"""Gauss-Newton-Bartlett: the squared gradient on labels that the model draws itself (Algorithm 2).

For B predictions with outputs z_b and labels y_b drawn from p(. | z_b),

    h_hat = B * ( grad of (1/B) sum_b -log p(y_b | z_b) )^2
          = ( grad of sum_b -log p(y_b | z_b) / sqrt(B) )^2 .

It is unbiased for the diagonal of the Gauss-Newton matrix (1/B) sum_b J_b^T S_b J_b, S_b the curvature of
-log p in the outputs. In four lines: write e_b for the gradient of -log p(y_b | z_b) in z_b. (1) E e_b = 0,
as the labels are the model's own (Bartlett's first identity). (2) E e_b e_b^T = S_b (Bartlett's second). (3)
The draws are independent, so the cross terms E e_b e_c^T vanish. (4) Hence E (sum_b J_b^T e_b)^2 / B = (1/B)
sum_b diag J_b^T S_b J_b. With the *training* labels (1) fails: that is the empirical Fisher, another
quantity.

The second form is what runs: it needs no factor afterwards, and numbers of the size of sqrt(h) fit in
half precision. One draw has a relative standard deviation of about sqrt(2) a coordinate, whatever B: the EMA
is there to average it.

Any e_b with (1) and (2), drawn independently, will do. For classes it is not the gradient for one label but
the difference of those for two, divided by sqrt(2) (``likelihoods.Categorical``): the softmax cancels, and
the backward through the last layer, a quarter of a small language model, is spared
(``sophia.curvature.last_layer``). As the expectation is the same, so is what is estimated;
``Categorical(pairs=0)`` is the paper's single label.

Source: arXiv 2305.14342v4, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.curvature.estimate import Estimate, Estimator, MicroBatch, PassByHand, PassContext, take_gradients
from sophia.likelihoods import Categorical, Head, Heads, Likelihood, heads_of

__all__ = ["GaussNewtonBartlett"]


class GaussNewtonBartlett(Estimator):
    """Unbiased, never negative; one forward and one backward over a part of the batch.

    Args:
        likelihood: the distribution that the loss is the negative logarithm of; categorical by default;
            ``sophia.likelihoods.Heads`` for models with several outputs.
    """

    def __init__(self, likelihood: Likelihood | Heads | None = None) -> None:
        self.likelihood = Categorical() if likelihood is None else likelihood

    def estimate(self, context: PassContext) -> Estimate:
        """Return ``(gradient of the sampled loss, summed and divided by sqrt(B))^2``."""
        heads = heads_of(self.likelihood)
        # Equal on all ranks: a head that counts nothing anywhere is left out everywhere.
        drawn = False
        for batch in context.micro_batches:
            drawn |= self._backward(batch, heads, self._roots(batch, heads, context))
        squares = _squares(context.sum_over_ranks(take_gradients(context.parameters)))
        return Estimate(squares, context.count, drawn)

    @staticmethod
    def _roots(
        batch: MicroBatch, heads: Sequence[Head], context: PassContext
    ) -> list[tuple[float, Tensor | None]]:
        """For each output the root of what its predictions weigh: a number, and a tensor where they differ.

        In the loss of the whole step a prediction weighs 1 / B, or what was read from the user's backward; a
        part of the step stands for ``share`` times as many. So the square of the sum is unbiased, whichever
        part each rank has drawn.
        """
        roots: list[tuple[float, Tensor | None]] = []
        for number, weights, stated in zip(batch.heads, batch.weights, batch.stated, strict=True):
            head, total = heads[number], context.totals[number]
            if not total:  # equal on all ranks: a head that counts nothing anywhere is left out everywhere
                roots.append((0.0, None))
            elif weights is None:
                own = None if stated is None else stated.sqrt()
                roots.append(((head.weight * batch.share / total) ** 0.5, own))
            else:
                roots.append(((context.factor * batch.share) ** 0.5, weights.clamp(min=0).sqrt()))
        return roots

    def _backward(
        self, batch: MicroBatch, heads: Sequence[Head], scales: Sequence[tuple[float, Tensor | None]]
    ) -> bool:
        """Back-propagate the gradients for labels drawn from the model; returns whether any is not zero."""
        drawn = False
        roots: list[Tensor] = []
        cotangents: list[Tensor | None] = []
        returned, readouts = batch.forward_with_readouts()
        parts = zip(batch.heads, batch.outputs(returned), readouts, batch.masks, scales, strict=True)
        for place, (number, output, readout, mask, (scale, weights)) in enumerate(parts):
            if not scale:
                continue
            head, before = heads[number], batch.heads[:place].count(number)
            # Another stream of noise for each output of a head: their labels are independent.
            purpose = f"{head.purpose}, output {before}" if before else head.purpose
            likelihood, labels = head.likelihood, batch.generator(purpose)
            if readout is not None and isinstance(likelihood, Categorical) and likelihood.pairs:
                contrast = likelihood.contrast(output, mask, labels, scale=scale)
                if weights is not None:
                    contrast = contrast.times(weights.reshape(-1))
                drawn |= not contrast.is_zero()
                roots.append(readout.loss(contrast))
                cotangents.append(None)
            else:
                gradient = likelihood.sampled_gradient(output, mask, labels, scale=scale)
                if weights is not None:
                    shape = (*weights.shape, *[1] * likelihood.event_dims)
                    gradient = (gradient * weights.view(shape)).to(gradient.dtype)
                drawn |= bool(gradient.any())
                roots.append(output)
                cotangents.append(gradient)
        # The logits go before the backward needs memory. And it is backward, not autograd.grad: sharded
        # parameters and reentrant checkpointing need it.
        del returned, output, parts
        batch.backward(roots, cotangents)
        return drawn

    def by_hand(self, context: PassContext) -> PassByHand:
        """Return the handle with ``sampled_loss(logits, mask)``."""
        if isinstance(self.likelihood, Heads):
            raise TypeError(
                "a pass by hand knows the counts of its heads at its end only, and their scales are "
                "needed before the backward: Heads go with mode='replay'. By hand, give one output and its "
                "likelihood"
            )
        return _SampledPass(self.likelihood, context)


class _SampledPass(PassByHand):
    def __init__(self, likelihood: Likelihood, context: PassContext) -> None:
        self._likelihood, self._context = likelihood, context
        self._count, self._calls = 0, 0

    def sampled_loss(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return a scalar to call ``.backward()`` on; its gradient is that of the summed loss on sampled
        labels.

        Args:
            logits: outputs of the model, e.g. ``(B, T, V)``; they must require grad.
            mask: bool, ``(B, T)``, True where the prediction enters the training loss; everything by default.
                Or numbers: what each weighs in a mean over those that are not zero.
        """
        shape = self._likelihood.prediction_shape(logits)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
        weights = mask.detach() if mask.is_floating_point() else None
        if weights is not None:
            mask = weights > 0
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}, but logits of shape "
                f"{tuple(logits.shape)} hold predictions "
                f"of shape {tuple(shape)}: pass a bool mask of that shape, e.g. labels != -100"
            )
        if not logits.requires_grad:
            raise ValueError(
                "the logits do not require grad: run the model with gradients on, inside the hessian_pass() "
                "block"
            )
        generator = self._context.shared_generator(f"labels by hand {self._context.rank} {self._calls}")
        self._calls += 1
        self._count += int(mask.sum())
        return _SampledLoss.apply(logits, mask, weights, generator, self._likelihood)  # type: ignore[no-any-return, no-untyped-call]

    def finish(self) -> Estimate:
        count = self._context.count_over_ranks(self._count)
        gradients = self._context.sum_over_ranks(take_gradients(self._context.parameters))
        if count == 0:
            return Estimate([None] * len(gradients), 0.0)
        return Estimate(_squares([g if g is None else g * count**-0.5 for g in gradients]), count)


class _SampledLoss(torch.autograd.Function):
    """A scalar whose gradient is the likelihood's closed form: no graph over the vocabulary is built.

    Its value is zero: what counts is the gradient, and the sampled loss itself is nobody's objective.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        mask: Tensor,
        weights: Tensor | None,
        generator: torch.Generator,
        likelihood: Likelihood,
    ) -> Tensor:
        gradient = likelihood.sampled_gradient(logits, mask, generator)
        if weights is not None:
            shape = (*weights.shape, *[1] * likelihood.event_dims)
            gradient = gradient * weights.sqrt().view(shape).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None


def _squares(gradients: list[Tensor | None]) -> list[Tensor | None]:
    # In place: the gradients of the pass are ours, and a copy would be as large as the model.
    return [None if g is None else g.square_() for g in gradients]
