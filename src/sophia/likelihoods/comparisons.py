"""Losses of scalar outputs that no likelihood of single elements has: of differences of outputs, and of
straight pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia.likelihoods.lines import TOLERANCE
from sophia.likelihoods.misfit import Problem

__all__ = ["in_pairs", "in_pieces", "of_pairs", "of_pieces"]

_ENOUGH = 8  # elements, below which nothing is concluded
_DIGITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def in_pairs(gradient: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers come in pairs of opposite sign, of more than two sizes: scores that a loss subtracts
    from each other. Equal sizes say nothing, as at the start all answers may be as uncertain.
    """
    up, down = (part.sort().values for part in (gradient[gradient > 0], -gradient[gradient < 0]))
    if len(up) != len(down) or len(up) < 3:
        return False
    near = _DIGITS.get(dtype, 1e-5) * up[-1]
    return bool(((up - down).abs() <= near).all()) and int((up.diff() > 10 * near).sum()) >= 2


def in_pieces(gradient: Tensor, outputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers take few values where the outputs take many: slopes of straight pieces."""
    if len(gradient) < _ENOUGH or not bool(gradient.any()):
        return False
    return (
        _values(gradient, TOLERANCE.get(dtype, 1e-3))
        <= max(2, len(gradient) // _ENOUGH)
        < (_values(outputs, 1e-3) // 2)
    )


def _values(numbers: Tensor, tolerance: float) -> int:
    """How many there are that differ by more than a tolerance, in units of the largest."""
    size = numbers.abs().max().clamp(min=1e-38)
    return 1 + int(((numbers / size).sort().values.diff() > tolerance).sum())


def of_pairs(loss: str) -> Problem:
    """Of scores that are compared, taken for answers of their own."""
    return Problem(
        "pairs",
        "it comes in pairs of opposite sign, so the loss is one of differences: two scores are compared (a "
        "reward model, a ranking), and the prediction is the pair and not the score",
        "Give the differences: with chosen rows first and rejected ones then, likelihood='bernoulli' and "
        "logits_fn=lambda output: torch.sub(*output.chunk(2)) for -logsigmoid(chosen - rejected); where they "
        "come from two forwards use mode='manual' and hp.sampled_loss(chosen - rejected)",
        nonsense=True,
        of=loss,
    )


def of_pieces(loss: str) -> Problem:
    """Of slopes that do not depend on the output."""
    return Problem(
        "straight pieces",
        "it takes a few values only, whatever the outputs are: the loss is made of straight pieces "
        "(quantiles by the pinball loss, an absolute error, a hinge), which have no curvature",
        "Use an optimizer without curvature for it, or a smooth loss in its place (softplus for the hinge or "
        "the pinball, and estimator='hutchinson'; mse_loss)",
        nonsense=True,
        of=loss,
    )
