"""Likelihoods of one number an element: yes or no, a real number, a count."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sophia.likelihoods.elements import Kept, kept_of, read_counts, read_squares, read_yes_or_no
from sophia.likelihoods.likelihood import Likelihood
from sophia.likelihoods.sampling import at_least_float32
from sophia.likelihoods.weights import Reading

__all__ = ["Bernoulli", "Gaussian", "Poisson"]

_OF_MSE = math.sqrt(0.5)


class Bernoulli(Likelihood):
    """One yes-or-no answer an element, ``y ~ sigmoid(logit)``; the loss is ``BCEWithLogitsLoss``."""

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (sigmoid(logit) - y_hat)`` where the mask is True."""
        with torch.no_grad():
            p = torch.sigmoid(outputs.detach().to(at_least_float32(outputs)))
            uniforms = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
            return ((p - (uniforms < p).to(p.dtype)) * (scale * mask)).to(outputs.dtype)

    def probes(self, outputs: Tensor) -> Tensor:
        """The probabilities."""
        return torch.sigmoid(outputs.detach().to(at_least_float32(outputs)))

    def weights(self, gradient: Tensor, probes: Tensor, counted: Tensor) -> Reading:
        """``gradient / (p - y)``, where the sign of the gradient tells y."""
        return read_yes_or_no(gradient, probes, counted)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``p (1 - p)`` for each element."""
        p = torch.sigmoid(outputs)
        return p * (1 - p)


class Gaussian(Likelihood):
    """A real number an element, ``y ~ N(output, sigma^2)``.

    The default ``sigma = sqrt(1/2)`` makes ``-log p`` equal to the squared error up to a constant, so that
    the curvature is exactly that of ``torch.nn.MSELoss``: 2 an element, whatever the noise in the data is.
    No sigma has to be estimated for it. Another sigma is for a loss with another factor, ``(output - y)^2 /
    (2 sigma^2)``, and may be a function that returns it, for one that is learned or estimated on the way.
    Every element is one prediction.

    Args:
        sigma: a positive number, or a function of no argument that returns a number or a tensor that
            broadcasts to the outputs; it is called in every pass.

    >>> log_sigma = torch.tensor(-1.0)    # learned; the loss is (output - y)^2 / (2 sigma^2) + log_sigma
    >>> likelihood = Gaussian(lambda: log_sigma.exp())
    >>> likelihood.output_curvature(torch.zeros(2))
    tensor([7.3891, 7.3891])
    """

    def __init__(self, sigma: float | Callable[[], float | Tensor] = _OF_MSE) -> None:
        if not callable(sigma) and not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(
                f"sigma is {sigma!r}: a standard deviation is a positive number; sqrt(0.5) matches MSELoss"
            )
        self.sigma = sigma

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (output - y_hat) / sigma^2 = -scale * z / sigma`` with z standard normal."""
        with torch.no_grad():
            dtype = at_least_float32(outputs)
            z = torch.randn(outputs.shape, dtype=dtype, device=outputs.device, generator=generator)
            sigma = self._now()
            if isinstance(sigma, Tensor) and not _broadcasts(sigma, outputs):
                raise ValueError(
                    f"sigma has shape {tuple(sigma.shape)} and the outputs have {tuple(outputs.shape)}: a "
                    "refresh runs a part of the rows, and which ones sigma() cannot know. For weights of "
                    "rows give mask_fn=, what each element weighs in (weights * (output - y) ** 2).mean(), "
                    "and a plain Gaussian(); or run whole batches: fraction=1.0"
                )
            return (z * mask).mul_(-scale / sigma).to(outputs.dtype)

    def probes(self, outputs: Tensor) -> Kept:
        """Some of the outputs."""
        return kept_of(outputs)

    def weights(self, gradient: Tensor, probes: Kept, counted: Tensor) -> Reading:
        """None are read: any weight goes with some target. Absolute errors are told."""
        return read_squares(gradient, probes, counted)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``1 / sigma^2`` for each element."""
        return torch.ones_like(outputs) / self._now() ** 2

    def _now(self) -> float | Tensor:
        if not callable(self.sigma):
            return self.sigma
        sigma = self.sigma()
        return sigma.detach() if isinstance(sigma, Tensor) else sigma


class Poisson(Likelihood):
    """A count an element, ``y ~ Poisson(exp(output))``; the loss is ``PoissonNLLLoss`` with its log input."""

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (exp(output) - y_hat)`` where the mask is True."""
        with torch.no_grad():
            rate = outputs.detach().to(at_least_float32(outputs)).exp()
            # torch.poisson refuses NaN; like everywhere, it must come out of the pass and be skipped there.
            drawn = torch.poisson(rate.nan_to_num(0.0, posinf=0.0), generator=generator)
            return ((rate - drawn) * (scale * mask)).to(outputs.dtype)

    def probes(self, outputs: Tensor) -> Kept:
        """Some of the outputs."""
        return kept_of(outputs)

    def weights(self, gradient: Tensor, probes: Kept, counted: Tensor) -> Reading:
        """The one under which the targets are whole numbers."""
        return read_counts(gradient, probes, counted)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``exp(output)`` for each element."""
        return outputs.exp()


def _broadcasts(tensor: Tensor, outputs: Tensor) -> bool:
    """Whether it fits, and does not make more of the outputs."""
    pairs = zip(reversed(tensor.shape), reversed(outputs.shape), strict=False)
    return tensor.ndim <= outputs.ndim and all(a in (1, b) for a, b in pairs)
