"""What the model's outputs mean: the distribution p(y | outputs) from which a Gauss-Newton pass samples
labels.

A likelihood answers three questions: how many predictions are in an output tensor, what is the gradient of
the negative log-likelihood for labels *sampled from the model*, and (for tests and tiny models) what is the
exact curvature of the negative log-likelihood in the outputs. Its loss is the one the user trains with, up to
the labels: cross-entropy for ``Categorical``, ``BCEWithLogitsLoss`` for ``Bernoulli``, ``MSELoss`` for
``Gaussian``, ``PoissonNLLLoss`` for ``Poisson``.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor

# Logits entries per chunk: 16 MB of float32.
CHUNK = 2**22

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson", "likelihood_named"]


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


class Categorical(Likelihood):
    """One of V classes, ``y ~ softmax(logits)``; the loss is cross-entropy. Classes lie in the last
    dimension.
    """

    event_dims = 1

    def draw(self, probabilities: Tensor, uniforms: Tensor) -> Tensor:
        """Turn one uniform number a row into one class a row: ``(n, V), (n,) -> (n,)``."""
        return inverse_cdf(probabilities, uniforms)

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (softmax(logits) - onehot(y_hat))``, in closed form and in chunks of rows.

        The softmax is computed once for the draw and for the gradient, in float32, a few million entries at a
        time: neither a graph nor a float32 copy of all logits ever exists.
        """
        with torch.no_grad():
            logits = outputs.detach().reshape(-1, outputs.shape[-1])
            rows = mask.reshape(-1)
            dense = bool(rows.all())
            index = None if dense else rows.nonzero().squeeze(1)
            n = logits.shape[0] if index is None else index.shape[0]
            gradient = torch.empty_like(logits) if dense else torch.zeros_like(logits)
            # All uniforms at once: the labels do not depend on the chunk size.
            uniforms = torch.rand(n, dtype=_fine(logits), device=logits.device, generator=generator)
            chunk = max(1, CHUNK // max(1, logits.shape[-1]))
            for start in range(0, n, chunk):
                part: Any = slice(start, start + chunk) if index is None else index[start : start + chunk]
                p = torch.softmax(logits[part], -1, dtype=_at_least_float32(logits))
                y = self.draw(p, uniforms[start : start + chunk])
                p.scatter_add_(1, y[:, None], p.new_full((y.shape[0], 1), -1.0))
                gradient[part] = p.mul_(scale).to(gradient.dtype)
            return gradient.view_as(outputs)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``diag(p) - p p^T`` for each row."""
        p = torch.softmax(outputs, -1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def mismatch(self, gradient: Tensor) -> float:
        """The gradient of a cross-entropy is p - q with two distributions: it sums to zero over the
        classes.
        """
        if gradient.dtype == torch.float16:  # small probabilities underflow there, and the sum with them
            return 0.0
        size = gradient.abs().sum(dtype=torch.float32)
        rest = gradient.sum(-1, dtype=torch.float32).abs().sum()
        return float(rest / size) if size > 0 else 0.0


class Bernoulli(Likelihood):
    """One yes-or-no answer an element, ``y ~ sigmoid(logit)``; the loss is ``BCEWithLogitsLoss``."""

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (sigmoid(logit) - y_hat)`` where the mask is True."""
        with torch.no_grad():
            p = torch.sigmoid(outputs.detach().to(_at_least_float32(outputs)))
            uniforms = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
            return ((p - (uniforms < p).to(p.dtype)) * (scale * mask)).to(outputs.dtype)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``p (1 - p)`` for each element."""
        p = torch.sigmoid(outputs)
        return p * (1 - p)


class Gaussian(Likelihood):
    """A real number an element, ``y ~ N(output, sigma^2)``.

    The default ``sigma = sqrt(1/2)`` makes ``-log p`` equal to the squared error up to a constant, so that
    the curvature is exactly that of ``torch.nn.MSELoss``. Every element is one prediction.
    """

    def __init__(self, sigma: float = math.sqrt(0.5)) -> None:
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(
                f"sigma is {sigma!r}: a standard deviation is a positive number; sqrt(0.5) matches MSELoss"
            )
        self.sigma = sigma

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (output - y_hat) / sigma^2 = -scale * z / sigma`` with z standard normal."""
        with torch.no_grad():
            dtype = _at_least_float32(outputs)
            z = torch.randn(outputs.shape, dtype=dtype, device=outputs.device, generator=generator)
            return (z * mask).mul_(-scale / self.sigma).to(outputs.dtype)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``1 / sigma^2`` for each element."""
        return torch.full_like(outputs, 1 / self.sigma**2)


class Poisson(Likelihood):
    """A count an element, ``y ~ Poisson(exp(output))``; the loss is ``PoissonNLLLoss`` with its log input."""

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale * (exp(output) - y_hat)`` where the mask is True."""
        with torch.no_grad():
            rate = outputs.detach().to(_at_least_float32(outputs)).exp()
            # torch.poisson refuses NaN; like everywhere, it must come out of the pass and be skipped there.
            drawn = torch.poisson(rate.nan_to_num(0.0, posinf=0.0), generator=generator)
            return ((rate - drawn) * (scale * mask)).to(outputs.dtype)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``exp(output)`` for each element."""
        return outputs.exp()


def inverse_cdf(probabilities: Tensor, uniforms: Tensor, *, block: int = 64) -> Tensor:
    """Draw one class a row by inverting the cumulative distribution, in two levels: ``(n, V), (n,) -> (n,)``.

    One uniform number a row instead of one exponential a logit, which is what makes ``multinomial`` and the
    Gumbel trick ten times slower on a CPU. First the block of 64 classes is found from the sums of the
    blocks, then the class inside it. The sums are float64 where the device has it: one float32 cumulative sum
    over a vocabulary cannot reach classes of probability below about 6e-8. NaN goes in, some index comes out,
    and no error.

    >>> inverse_cdf(torch.tensor([[0.1, 0.2, 0.7]]).expand(3, 3), torch.tensor([0.05, 0.25, 0.99]))
    tensor([0, 1, 2])
    """
    n, classes = probabilities.shape
    fine = _fine(probabilities)
    whole = classes // block * block
    sums = probabilities[:, :whole].view(n, -1, block).sum(-1, dtype=fine)
    if whole < classes:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True, dtype=fine)], 1)
    edges = sums.cumsum_(1)
    # Scaling by the total makes rounding of the softmax harmless; the clamps catch u * total == total.
    target = (uniforms.to(fine) * edges[:, -1])[:, None]
    which = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    below = torch.where(which > 0, edges.gather(1, (which - 1).clamp_(min=0)), edges.new_zeros(()))
    index = which * block + torch.arange(block, device=probabilities.device)
    inside = (
        probabilities.gather(1, index.clamp(max=classes - 1))
        .to(fine)
        .masked_fill_(index >= classes, 0)
        .cumsum_(1)
    )
    offset = torch.searchsorted(inside, target - below, right=True).clamp_(max=block - 1)
    return (which * block + offset).clamp_(max=classes - 1).squeeze(1)


def likelihood_named(name: str | Likelihood) -> Likelihood:
    """Turn a name or an object into a likelihood."""
    if isinstance(name, Likelihood):
        return name
    table: dict[str, type[Likelihood]] = {
        "categorical": Categorical,
        "bernoulli": Bernoulli,
        "gaussian": Gaussian,
        "poisson": Poisson,
    }
    if name not in table:
        raise ValueError(
            f"likelihood={name!r} is unknown: give one of {', '.join(map(repr, table))} or an object "
            "derived from "
            "sophia.likelihoods.Likelihood"
        )
    return table[name]()


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fine(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
