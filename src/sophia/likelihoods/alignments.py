"""CTC: label sequences whose place in time nobody has told.

The model's own distribution over label sequences is that of a path drawn frame by frame, with repeats and
blanks taken out. So a label sequence is drawn by drawing a path, and what is propagated is the gradient of
the CTC loss for it. By Bartlett's identities its mean is zero and its covariance the curvature

    S = E_y ( d log p(y | z) / dz ) ( d log p(y | z) / dz )^T ,    y ~ p(y | z),

the expectation, over the labels of the model, of the Hessian of the loss in the outputs of an utterance: the
Fisher matrix, never negative. The Hessian for the training labels alone may be negative, and torch has no
second derivative of its CTC loss (neither native nor cuDNN). A softmax for each frame is another curvature,
and a larger one: that of a loss that is told the path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sophia.likelihoods.aligned import ends_know_two, lengths_of
from sophia.likelihoods.likelihood import Likelihood
from sophia.likelihoods.lines import TOLERANCE, digits
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.sampling import at_least_float32, inverse_cdf
from sophia.likelihoods.weights import Probes, Reading, probes_of

__all__ = ["CTC"]

_LEAST = 1e-4  # probability, under which a ratio has no digits


class CTC(Likelihood):
    """A label sequence for each utterance; the loss is ``ctc_loss``, with any reduction.

    Outputs are logits or log-probabilities ``(utterances, frames, classes)``; where time comes first,
    ``logits_fn=lambda output: output.transpose(0, 1)``. A frame is a prediction as far as counting goes:
    those beyond the length of an utterance have no gradient, and what is left is its length. The labels of
    an utterance couple all of its frames, so that ``output_curvature`` of one of them does not exist.

    Args:
        blank: class of the blank.
    """

    event_dims = 1

    def __init__(self, *, blank: int = 0) -> None:
        self.blank = blank

    def sampled_gradient(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Tensor:
        """``scale`` times the gradient of the CTC loss for label sequences of the model."""
        if mask.ndim not in (1, 2):
            raise ValueError(
                f"CTC got outputs of shape {tuple(outputs.shape)}: it aligns labels with the frames of "
                "utterances, (utterances, frames, classes)"
            )
        z = outputs.detach().to(at_least_float32(outputs)).view(-1, *outputs.shape[-2:])
        lengths = lengths_of(mask.view(z.shape[:2]))
        gradient = torch.zeros_like(z)
        some = lengths.nonzero().squeeze(1)
        # All uniforms at once: the paths do not depend on what counts.
        uniforms = torch.rand(z.shape[:2], dtype=z.dtype, device=z.device, generator=generator)
        if len(some) and bool(z.isfinite().all()):
            with torch.enable_grad():
                leaf = z[some].requires_grad_()
                log_p = torch.log_softmax(leaf, -1)
                paths = inverse_cdf(log_p.detach().exp().flatten(0, 1), uniforms[some].flatten())
                labels = self._collapsed(paths.view(log_p.shape[:2]).cpu(), lengths[some].cpu())
                sizes = torch.tensor([len(each) for each in labels])
                loss = F.ctc_loss(
                    log_p.transpose(0, 1),
                    torch.cat(labels).to(z.device),
                    lengths[some].cpu(),
                    sizes,
                    blank=self.blank,
                    reduction="sum",
                )
                (gradient[some],) = torch.autograd.grad(loss, leaf)
        elif len(some):
            gradient.fill_(torch.nan)  # it must come out of the pass, and is skipped there
        return (gradient * scale).view_as(outputs).to(outputs.dtype)

    def _collapsed(self, paths: Tensor, lengths: Tensor) -> list[Tensor]:
        """Paths without repeats and blanks."""
        kept = (torch.unique_consecutive(p[:n]) for p, n in zip(paths, lengths.tolist(), strict=True))
        return [path[path != self.blank] for path in kept]

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """Raises: the labels of an utterance couple its frames."""
        raise NotImplementedError(
            "a CTC loss has no curvature in one frame alone: its labels couple all frames of an utterance. "
            "Compare with the mean of squared gradients over all label sequences instead"
        )

    def probes(self, outputs: Tensor) -> Probes:
        """A few classes of each frame, and their probabilities."""
        return probes_of(outputs)

    def weights(self, gradient: Tensor, probes: Probes, counted: Tensor) -> Reading:
        """What each utterance weighs: the gradient is ``w (p - q)``, with q zero for classes that its labels
        have not, or have elsewhere.
        """
        flat, mask = gradient.detach().reshape(-1, gradient.shape[-1]), counted.reshape(-1)
        g, p = flat.gather(1, probes.classes), probes.probabilities
        dtype, g = digits(g), g.to(p.dtype)
        if not bool(g[mask].isfinite().all() & p[mask].isfinite().all()):
            return Reading(None)
        if counted.ndim == 2 and not ends_know_two(gradient, counted):
            return Reading(None, _no_alignment())
        near = 2 * TOLERANCE.get(dtype, 1e-3)
        # A sample of frames is of utterances of one weight.
        ratios = (g / p.clamp(min=_LEAST)).masked_fill((p < _LEAST) | ~mask[:, None], 0.0)
        ratios = ratios.view(*(counted.shape if counted.ndim == 2 else (1, len(mask))), -1).flatten(1)
        best = ratios.topk(min(2, ratios.shape[1]), 1).values
        tight = (best[:, -1] >= (1 - near) * best[:, 0]) | (best[:, 0] == 0)
        if not bool(tight.all()):
            return Reading(None, _unread(float((~tight).float().mean())))
        each = best[:, :1]
        weights = each.expand(-1, ratios.shape[1] // p.shape[1]).reshape(counted.shape)
        return Reading(torch.where(counted, weights, 0.0))


def _no_alignment() -> Problem:
    return Problem(
        "no alignment",
        "at the ends of an utterance more than two classes are its targets, where a CTC loss has the "
        "blank and one label",
        "Pass logits_fn=lambda output: output.transpose(0, 1) if time comes first in the output; for a label "
        "in each frame the likelihood is 'categorical'",
        nonsense=True,
        of="CTC loss",
    )


def _unread(share: float) -> Problem:
    return Problem(
        "unread utterances",
        f"what {share:.0%} of the utterances weigh in the loss cannot be read, as their labels hold every "
        "class at every time",
        "Until it can be read each frame weighs 1 / B: reduction='sum', divided by the number of all frames, "
        "has that mean",
        of="CTC loss",
    )
