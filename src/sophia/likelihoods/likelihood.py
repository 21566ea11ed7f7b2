"""What a likelihood is: how many predictions an output holds, and the gradient for labels that it samples."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from sophia.likelihoods.sampling import rows_per_chunk
from sophia.likelihoods.weights import Reading

__all__ = ["Likelihood"]

# Classes that are looked at first: a prediction that entered a cross-entropy has a gradient in nearly all.
_GLANCE = 64


class Likelihood(abc.ABC):
    """Distribution of one prediction given the model's output for it.

    Write your own by giving ``event_dims``, ``sampled_gradient`` and ``output_curvature``.
    """

    event_dims: int = 0
    """How many trailing dimensions of the output belong to one prediction: 1 for class logits, 0 for
    scalars.
    """

    def prediction_shape(self, outputs: Tensor) -> torch.Size:
        """Shape of the mask that says which predictions count: ``(B, T)`` for logits ``(B, T, V)``."""
        return outputs.shape[: outputs.ndim - self.event_dims]

    def counted(self, gradient: Tensor) -> Tensor:
        """Mask of the predictions that entered a loss, from the loss's gradient in the outputs."""
        if not self.event_dims:
            return gradient != 0
        if gradient.device.type != "cpu" or gradient.shape[-1] <= _GLANCE:
            return (gradient != 0).any(-1)
        # Reading every logit of every prediction is a few per cent of a training step on a CPU, and one that
        # is not zero settles it: only where the first classes are all zero are the others read.
        counted = (gradient[..., :_GLANCE] != 0).any(-1)
        flat, rows = gradient.reshape(-1, gradient.shape[-1]), (~counted).reshape(-1).nonzero().squeeze(1)
        for part in torch.split(rows, rows_per_chunk(flat)):
            counted.view(-1)[part] = (flat[part] != 0).any(-1)
        return counted

    @abc.abstractmethod
    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """Gradient in the outputs of ``scale * sum over counted predictions of -log p(y_hat | outputs)``.

        The labels y_hat are drawn from the model's own distribution with ``generator``.

        Args:
            outputs: what the model returned, e.g. logits ``(B, T, V)``; any floating dtype.
            mask: bool, ``prediction_shape(outputs)``; True where the prediction counts.
            generator: the only source of randomness; on the device of ``outputs``.
            scale: a factor on the result.

        Returns:
            A tensor like ``outputs``, zero where ``mask`` is False.
        """

    @abc.abstractmethod
    def output_curvature(self, outputs: Tensor) -> Tensor:
        """Exact Hessian of ``-log p`` in the outputs of one prediction: ``(n, V, V)`` for ``(n, V)``,
        ``(n,)`` for ``(n,)``.
        """

    def probes(self, outputs: Tensor) -> Any:
        """What to keep of the outputs until their gradient arrives, for ``weights``; None if nothing."""
        return None

    def weights(self, gradient: Tensor, probes: Any, counted: Tensor) -> Reading:
        """Read the weight of each counted prediction from the gradient of the user's loss in the outputs.

        What is not read is taken for a mean over the predictions: each weighs 1 / B.
        """
        return Reading(None)
