"""Distillation: a teacher's softmax at a temperature, alone or beside the labels.

The loss of a prediction with logits z, the teacher's distribution q at temperature T, and a label y, is

    hard * CE(z, y) + soft * T^2 * KL(q || softmax(z / T)),

as it is usually written (Hinton, Vinyals, Dean, arXiv 1503.02531). Its curvature in z is free of q and y:

    hard * S(softmax(z)) + soft * S(softmax(z / T)),    S(p) = diag(p) - p p^T:

the T^2 and the two divisions by T cancel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sophia.likelihoods.categorical import Categorical
from sophia.likelihoods.evidence import BALANCE, Evidence
from sophia.likelihoods.lines import digits
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.problems import one_column
from sophia.likelihoods.sampling import Contrast
from sophia.likelihoods.soft_targets import soft_weights
from sophia.likelihoods.weights import Probes, Reading, probes_of

__all__ = ["Distillation"]

_OF = "distillation at this temperature"


class Distillation(Categorical):
    """One of V classes, taught by a teacher at a temperature; classes lie in the last dimension.

    The teacher's distribution is not known here, so that what a prediction weighs in the loss is open: a mean
    and a sum are told from each other where the teacher gives some class next to nothing, and else a mean is
    assumed; a gradient that is too large for it is told.

    Args:
        temperature: T.
        hard: what the cross-entropy of the labels is multiplied with; 0 without one.
        soft: what ``T^2 * KL`` is multiplied with. Without the T^2 in your loss it is your factor / T^2.

    >>> Distillation(2.0, hard=0.5, soft=0.5).output_curvature(torch.zeros(1, 2))
    tensor([[[ 0.2500, -0.2500],
             [-0.2500,  0.2500]]])
    """

    def __init__(self, temperature: float, *, hard: float = 0.0, soft: float = 1.0) -> None:
        super().__init__()
        numbers = (temperature, hard, soft)
        if not (all(map(math.isfinite, numbers)) and temperature > 0 and hard >= 0 and soft > 0):
            raise ValueError(
                f"temperature={temperature!r}, hard={hard!r}, soft={soft!r}: a temperature and the factor of "
                "the teacher's part are above 0, that of the labels' part is not below it. Without a "
                "teacher's part the likelihood is 'categorical'"
            )
        self.temperature, self.hard, self.soft = temperature, hard, soft

    def contrast(
        self, outputs: Tensor, mask: Tensor, generator: torch.Generator, *, scale: float = 1.0
    ) -> Contrast:
        """Pairs of labels from both softmaxes, drawn independently."""
        taught = super().contrast(
            outputs.detach() / self.temperature, mask, generator, scale=scale * self.soft**0.5
        )
        if not self.hard:
            return taught
        labelled = super().contrast(outputs, mask, generator, scale=scale * self.hard**0.5)
        parts = ((taught.labels, labelled.labels), (taught.values, labelled.values))
        return Contrast(taught.rows, *(torch.cat(pair, 1) for pair in parts))

    def output_curvature(self, outputs: Tensor) -> Tensor:
        """``hard * S(softmax(z)) + soft * S(softmax(z / T))`` for each row."""
        taught = self.soft * super().output_curvature(outputs / self.temperature)
        return taught + self.hard * super().output_curvature(outputs)

    def probes(self, outputs: Tensor) -> Any:
        """Those of both softmaxes."""
        return probes_of(outputs), probes_of(outputs.detach() / self.temperature)

    def weights(self, gradient: Tensor, probes: Any, counted: Tensor) -> Reading:
        """Bounds by ``gradient / (hard * p + soft * T * p_T)``, of which what the targets have is taken off
        in the gradient.
        """
        hard: Probes
        soft: Probes
        hard, soft = probes
        flat, mask = gradient.detach().reshape(-1, gradient.shape[-1]), counted.reshape(-1)
        if flat.shape[-1] == 1:
            return Reading(None, one_column())
        rows = mask.nonzero().squeeze(1)
        found = torch.zeros(mask.shape, dtype=hard.probabilities.dtype, device=gradient.device)
        if not len(rows):
            return Reading(found.view(counted.shape))
        g = flat.gather(1, hard.classes)[rows]
        dtype, g = digits(g), g.to(found.dtype)
        p = self.hard * hard.probabilities[rows] + self.soft * self.temperature * soft.probabilities[rows]
        if not bool(g.isfinite().all() & p.isfinite().all()):
            return Reading(None)
        evidence = Evidence.of(flat, g, p, hard, mask, rows, dtype)
        if evidence.is_noise(len(rows)):
            return Reading(None)
        if evidence.imbalance() > BALANCE.get(dtype, 1e-4):
            return Reading(None, _unlike(evidence))
        weights, problem = soft_weights(g, p, dtype)
        if weights is None:
            least = float((g / p.clamp(min=1e-4)).max()) * len(rows)
            return Reading(None, _too_large(least) if problem is not None and least > 1.001 else None)
        found[rows] = weights
        return Reading(found.view(counted.shape))


def _unlike(evidence: Evidence) -> Problem:
    return Problem(
        "no distillation",
        f"over the classes it sums to {evidence.sum_of_size()} instead of 0, so the output is not the logits "
        "that student and teacher are compared by",
        "Pass logits_fn=, a function from the output to the logits; for a squared error between logits or "
        "hidden states give likelihood='gaussian'",
        nonsense=True,
        of=_OF,
    )


def _too_large(least: float) -> Problem:
    return Problem(
        "larger than a mean",
        f"somewhere it is at least {least:.3g} of what a mean of hard * CE(z, y) + soft * T^2 * KL(q || "
        "softmax(z / T)) can have: temperature, hard= or soft= are others in your loss, it is a sum, "
        "predictions are weighted, or the divergence is the reverse one",
        "Give Distillation(temperature, hard=, soft=) the numbers of your loss; for the reverse divergence "
        "use estimator='hutchinson'",
        of=_OF,
    )
