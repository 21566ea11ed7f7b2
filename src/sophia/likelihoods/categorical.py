"""Cross-entropy: one of V classes, drawn from the softmax, without a copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sophia.likelihoods.likelihood import Likelihood, at_least_float32, fine

# Logits entries per chunk: 16 MB of float32.
CHUNK = 2**22

__all__ = ["Categorical", "inverse_cdf"]


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
            uniforms = torch.rand(n, dtype=fine(logits), device=logits.device, generator=generator)
            chunk = max(1, CHUNK // max(1, logits.shape[-1]))
            for start in range(0, n, chunk):
                part: Any = slice(start, start + chunk) if index is None else index[start : start + chunk]
                p = torch.softmax(logits[part], -1, dtype=at_least_float32(logits))
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
    wide = fine(probabilities)
    whole = classes // block * block
    sums = probabilities[:, :whole].view(n, -1, block).sum(-1, dtype=wide)
    if whole < classes:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True, dtype=wide)], 1)
    edges = sums.cumsum_(1)
    # Scaling by the total makes rounding of the softmax harmless; the clamps catch u * total == total.
    target = (uniforms.to(wide) * edges[:, -1])[:, None]
    which = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    below = torch.where(which > 0, edges.gather(1, (which - 1).clamp_(min=0)), edges.new_zeros(()))
    index = which * block + torch.arange(block, device=probabilities.device)
    inside = (
        probabilities.gather(1, index.clamp(max=classes - 1))
        .to(wide)
        .masked_fill_(index >= classes, 0)
        .cumsum_(1)
    )
    offset = torch.searchsorted(inside, target - below, right=True).clamp_(max=block - 1)
    return (which * block + offset).clamp_(max=classes - 1).squeeze(1)
