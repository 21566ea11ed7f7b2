"""Losses of one number an element: the weight of each is read, or it is said that it cannot be."""

import pytest
import torch
from curvature_cases import Case, check_curvature, check_curvature_or_told, classifier, rows
from torch.nn import functional as F

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
    "weights-gaussian-mean": elements("gaussian", lambda z, d: F.mse_loss(z, d[2])),
    "weights-poisson-mean": elements("poisson", lambda z, d: F.poisson_nll_loss(z, counts(d))),
}
# The gradient alone, w (z - y) with w and y unknown, does not tell the weight: read in another way, or said.
MAY_BE_TOLD = {
    "weights-gaussian-sum": elements("gaussian", lambda z, d: F.mse_loss(z, d[2], reduction="sum")),
    "weights-gaussian-half": elements("gaussian", lambda z, d: 0.5 * F.mse_loss(z, d[2])),
    "weights-gaussian-rows": elements(
        "gaussian", lambda z, d: (ROW_WEIGHTS.to(z.dtype)[:, None] * (z - d[2]).square()).mean()
    ),
    "weights-gaussian-sum-over-features": elements(
        "gaussian", lambda z, d: (z - d[2]).square().sum(-1).mean()
    ),
    "weights-gaussian-smooth-l1": elements("gaussian", lambda z, d: F.smooth_l1_loss(z, d[2])),
    "weights-gaussian-l1": elements("gaussian", lambda z, d: F.l1_loss(z, d[2])),
    "weights-poisson-sum": elements(
        "poisson", lambda z, d: F.poisson_nll_loss(z, counts(d), reduction="sum")
    ),
    "weights-bernoulli-soft-sum": elements(
        "bernoulli", lambda z, d: F.binary_cross_entropy_with_logits(z, d[2], reduction="sum")
    ),
}


@pytest.mark.parametrize("case", ELEMENTS.values(), ids=ELEMENTS)
def test_h_of_an_elementwise_loss(case):
    """The count of elements taken for the weight of each."""
    check_curvature(case)


@pytest.mark.parametrize("case", MAY_BE_TOLD.values(), ids=MAY_BE_TOLD)
def test_h_of_an_elementwise_loss_or_words(case):
    """Identical h for a mean, a sum, weighted rows and an absolute error, in silence."""
    check_curvature_or_told(case, r"weight|reduction|mean|sum|squared|scale")
