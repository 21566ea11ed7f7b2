"""Losses of one number an element: the weight of each is read, or it is said that it cannot be."""

import pytest
import torch
from curvature_cases import Case, check_curvature, check_curvature_or_told, classifier, rows
from torch.nn import functional as F

from sophia.likelihoods import Gaussian

ROW_WEIGHTS = torch.linspace(0.1, 3.0, 13)


def elements(likelihood, loss):
    settings = {"likelihood": likelihood}
    return Case(classifier, lambda: (*rows(), torch.rand(13, 5)), loss, settings=settings)


def answers(z, data):
    return (data[2] > 0.5).to(z.dtype)


def bce(z, data, **settings):
    return F.binary_cross_entropy_with_logits(z, answers(z, data), **settings)


def counts(data):
    return (data[2] * 4).floor()


ELEMENTS = {
    "weights-bernoulli-mean": elements("bernoulli", bce),
    "weights-bernoulli-sum": elements("bernoulli", lambda z, d: bce(z, d, reduction="sum")),
    "weights-bernoulli-rows": elements(
        "bernoulli", lambda z, d: bce(z, d, weight=ROW_WEIGHTS.to(z.dtype)[:, None])
    ),
    "weights-bernoulli-half": elements("bernoulli", lambda z, d: 0.5 * bce(z, d)),
    "weights-bernoulli-sum-over-classes": elements(
        "bernoulli", lambda z, d: bce(z, d, reduction="none").sum(-1).mean()
    ),
    "weights-bernoulli-of-positives": elements(
        "bernoulli", lambda z, d: bce(z, d, pos_weight=torch.arange(1.0, 6.0, dtype=z.dtype))
    ),
    "weights-gaussian-mean": elements("gaussian", lambda z, d: F.mse_loss(z, d[2])),
    "weights-poisson-mean": elements("poisson", lambda z, d: F.poisson_nll_loss(z, counts(d))),
}
MAY_BE_TOLD = {
    "weights-gaussian-l1": elements("gaussian", lambda z, d: F.l1_loss(z, d[2])),
    "weights-gaussian-huber-clipped": elements(
        "gaussian", lambda z, d: F.smooth_l1_loss(z, 4 * d[2], beta=0.5, reduction="sum")
    ),
    "weights-poisson-sum": elements(
        "poisson", lambda z, d: F.poisson_nll_loss(z, counts(d), reduction="sum")
    ),
    "weights-poisson-rows": elements(
        "poisson",
        lambda z, d: (
            ROW_WEIGHTS.to(z.dtype)[:, None] * F.poisson_nll_loss(z, counts(d), reduction="none")
        ).mean(),
    ),
    "weights-bernoulli-soft": elements("bernoulli", lambda z, d: F.binary_cross_entropy_with_logits(z, d[2])),
    "weights-bernoulli-soft-sum": elements(
        "bernoulli", lambda z, d: F.binary_cross_entropy_with_logits(z, d[2], reduction="sum")
    ),
    "weights-bernoulli-elements": elements(
        "bernoulli", lambda z, d: bce(z, d, weight=d[2] + 0.1, reduction="sum")
    ),
}
# The gradient, w (z - y), goes with any w and some y, and y is nobody's to know: a mean is assumed, as
# docs/drop-in.md says, and for another scale there is sigma.
HALF = 0.5**0.5
SCALED = {
    "weights-gaussian-sum": (lambda z, d: F.mse_loss(z, d[2], reduction="sum"), HALF / 65**0.5),
    "weights-gaussian-half": (lambda z, d: 0.5 * F.mse_loss(z, d[2]), 1.0),
    "weights-gaussian-rows": (
        lambda z, d: (ROW_WEIGHTS.to(z.dtype)[:, None] * (z - d[2]).square()).mean(),
        lambda: HALF / ROW_WEIGHTS.sqrt()[:, None],
    ),
    "weights-gaussian-sum-over-features": (
        lambda z, d: (z - d[2]).square().sum(-1).mean(),
        HALF / 5**0.5,
    ),
    # all errors within its middle
    "weights-gaussian-smooth-l1": (lambda z, d: F.smooth_l1_loss(z, d[2], beta=3.0), 3.0**0.5),
}


@pytest.mark.parametrize("case", ELEMENTS.values(), ids=ELEMENTS)
def test_h_of_an_elementwise_loss(case):
    """The count of elements taken for the weight of each."""
    check_curvature(case)


@pytest.mark.parametrize("case", MAY_BE_TOLD.values(), ids=MAY_BE_TOLD)
def test_h_of_an_elementwise_loss_or_words(case):
    """A sum, weighted rows, soft answers and an absolute error taken for a mean of hard ones, in silence."""
    check_curvature_or_told(case, r"weight|reduction|squared|scale")


@pytest.mark.parametrize(("loss", "sigma"), SCALED.values(), ids=SCALED)
def test_h_of_a_squared_error_with_a_stated_scale(loss, sigma):
    """No way to say what cannot be read."""
    check_curvature(elements(Gaussian(sigma), loss))
