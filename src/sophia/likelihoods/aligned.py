"""Signs of a CTC loss in the gradient of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sophia.likelihoods.misfit import Problem

__all__ = ["ends_know_two", "lengths_of", "looks_aligned", "of_alignments"]

_SOME = 64  # predictions that are looked at first


def lengths_of(mask: Tensor) -> Tensor:
    """Frames up to the last that counts, ``(N,)``; one in between may have no gradient by chance."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * places).amax(1) if mask.numel() else mask.sum(1)


def ends_know_two(gradient: Tensor, counted: Tensor) -> bool:
    """Whether the first and the last frame of each utterance have at most two classes: the blank, and the
    first, or last, label.
    """
    rows = counted.any(1)
    if not bool(rows.any()):
        return True
    first, last = counted[rows].float().argmax(1), lengths_of(counted[rows]) - 1
    ends = torch.stack([first, last], 1)
    below = (gradient[rows].gather(1, ends[..., None].expand(-1, -1, gradient.shape[-1])) < 0).sum(-1)
    return bool((below <= 2).all())


def looks_aligned(gradient: Tensor, counted: Tensor) -> bool:
    """Whether a gradient in three-dimensional logits is that of a CTC loss, in either order of time.

    In the middle of an utterance more than two classes have targets above their probability, at its ends two
    at most, and one of all, the blank, nearly everywhere. Teachers and mixed labels are not of that form.
    """
    if gradient.ndim != 3 or counted.ndim != 2 or not bool(counted.any()):
        return False
    places = counted.reshape(-1).nonzero().squeeze(1)
    some = places[:: max(1, len(places) // _SOME)][:_SOME]
    below = gradient.reshape(-1, gradient.shape[-1])[some] < 0
    if float((below.sum(-1) >= 3).float().mean()) < 0.2 or float(below.float().mean(0).max()) < 0.5:
        return False
    turned = (gradient.transpose(0, 1), counted.transpose(0, 1))
    return any(
        m.shape[0] > 1 and m.shape[1] > 3 and ends_know_two(g, m) for g, m in ((gradient, counted), turned)
    )


def of_alignments() -> Problem:
    """Of a CTC loss under a softmax for each frame."""
    return Problem(
        "alignments",
        "it is that of a CTC loss: soft targets of one blank, of two classes at most at both ends of an "
        "utterance and of more in between. A softmax for each frame, of which h would be made, is told which "
        "frame has which label, as the loss is not: its curvature is larger, and another",
        "Give likelihood=CTC(blank=...) from sophia.likelihoods, with logits_fn=lambda output: "
        "output.transpose(0, 1) where time comes first. (estimator='hutchinson' cannot serve: torch has no "
        "second derivative of ctc_loss)",
    )
