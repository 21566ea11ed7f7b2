"""What a likelihood is: how many predictions an output holds, and the gradient for labels that it samples."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

__all__ = ["Likelihood", "at_least_float32", "fine"]


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
        nonzero = gradient != 0
        return nonzero.any(-1) if self.event_dims else nonzero

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

    def mismatch(self, gradient: Tensor) -> float:
        """How unlike this likelihood's the gradient of the user's loss in the outputs is: 0 fits, 1 does
        not.
        """
        return 0.0


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype that probabilities of this tensor are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def fine(tensor: Tensor) -> torch.dtype:
    """Float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
