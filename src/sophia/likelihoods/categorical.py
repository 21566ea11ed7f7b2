"""Cross-entropy: classes drawn from the softmax, without a copy of all logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sophia.likelihoods.aligned import looks_aligned, of_alignments
from sophia.likelihoods.likelihood import Likelihood
from sophia.likelihoods.problems import elsewhere
from sophia.likelihoods.sampling import Contrast, at_least_float32, chunks, counted_rows, fine, inverse_cdf
from sophia.likelihoods.weights import Reading, dimension_of_classes, probes_of, read_weights

__all__ = ["Categorical"]


class Categorical(Likelihood):
    """One of V classes, ``y ~ softmax(logits)``; the loss is cross-entropy. Classes lie in the last
    dimension.

    The gradient for one sampled label is ``softmax - onehot(y)``. The difference of two of them, divided by
    sqrt(2), has the same mean and covariance, with the softmax cancelled: for independent labels a and b

        e = (onehot(b) - onehot(a)) / sqrt(2):    E e = 0,    E e e^T = diag(p) - p p^T,

    which is all that Gauss-Newton-Bartlett asks of it (``sophia.curvature.gauss_newton_bartlett``). It is
    zero in all but two classes, so that the last layer's backward needs two rows of its weight and not all
    of them; and its fourth moment is smaller, which is less noise in h for rare classes. Several pairs, added
    up and divided by the root of their number, cost next to nothing and have less still.

    Args:
        pairs: pairs of labels a prediction; 0 for one label and ``softmax - onehot(y)``, Algorithm 2 to the
            letter.
    """

    event_dims = 1
    pairs = 4

    def __init__(self, *, pairs: int = 4) -> None:
        if not isinstance(pairs, int) or pairs < 0:
            raise ValueError(f"pairs is {pairs!r}: give a number of pairs of labels, or 0 for single labels")
        self.pairs = pairs

    def draw(self, probabilities: Tensor, uniforms: Tensor) -> Tensor:
        """Turn uniform numbers into classes, any number a row: ``(n, V), (n, k) -> (n, k)``; also
        ``(n,) -> (n,)``.
        """
        return inverse_cdf(probabilities, uniforms)

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale`` times the gradient for sampled labels, in closed form: neither a graph nor a float32 copy
        of all logits ever exists.
        """
        if self.pairs:
            return self.contrast(outputs, mask, generator, scale=scale).dense(outputs)
        with torch.no_grad():
            logits, rows, n = counted_rows(outputs, mask)
            gradient = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
            # All uniforms at once: the labels do not depend on the chunk size.
            uniforms = torch.rand(n, dtype=fine(logits), device=logits.device, generator=generator)
            for part, chunk in chunks(logits, rows, n):
                p = torch.softmax(logits[part], -1, dtype=at_least_float32(logits))
                y = self.draw(p, uniforms[chunk])
                p.scatter_add_(1, y[:, None], p.new_full((y.shape[0], 1), -1.0))
                gradient[part] = p.mul_(scale).to(gradient.dtype)
            return gradient.view_as(outputs)

    def contrast(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Contrast:
        """``sampled_gradient``, told by its few entries. Needs ``pairs``.

        Logits that are not finite give NaN, as the softmax would.
        """
        with torch.no_grad():
            logits, rows, n = counted_rows(outputs, mask)
            shape = (n, 2 * self.pairs)
            uniforms = torch.rand(shape, dtype=fine(logits), device=logits.device, generator=generator)
            labels = torch.empty(shape, dtype=torch.int64, device=logits.device)
            values = torch.empty(shape, dtype=at_least_float32(logits), device=logits.device)
            signs = values.new_tensor([-1.0, 1.0]).repeat(self.pairs) * (scale / math.sqrt(2 * self.pairs))
            for part, chunk in chunks(logits, rows, n):
                p = torch.softmax(logits[part], -1, dtype=values.dtype)
                labels[chunk] = self.draw(p, uniforms[chunk])
                values[chunk] = signs + 0 * p[:, :1]  # one logit that is not finite makes its row NaN
            return Contrast(rows, labels, values)

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``diag(p) - p p^T`` for each row."""
        p = torch.softmax(outputs, -1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def probes(self, outputs: Tensor) -> Any:
        """A few classes of each prediction, and their probabilities."""
        return probes_of(outputs)

    def weights(self, gradient: Tensor, probes: Any, counted: Tensor) -> Reading:
        """Slopes of the gradient over the probabilities (``likelihoods.weights``)."""
        reading = read_weights(gradient, probes, counted)
        if reading.weights is None or reading.problem is not None:
            dim = dimension_of_classes(gradient)
            if dim is not None:
                return Reading(None, elsewhere(dim))
        if (reading.problem is None or not reading.problem.nonsense) and looks_aligned(gradient, counted):
            return Reading(reading.weights, of_alignments(), reading.fit)
        return reading

    def mismatch(self, gradient: Tensor) -> float:
        """The gradient of a cross-entropy is p - q with two distributions: it sums to zero over the
        classes.
        """
        if gradient.dtype == torch.float16:  # small probabilities underflow there, and the sum with them
            return 0.0
        size = gradient.abs().sum(dtype=torch.float32)
        rest = gradient.sum(-1, dtype=torch.float32).abs().sum()
        return float(rest / size) if size > 0 else 0.0
