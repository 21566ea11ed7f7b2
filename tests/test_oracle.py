"""The oracle of weighted losses, against the package's exact diagonals where both apply, and by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oracle import gauss_newton
from sophia.curvature.exact import gauss_newton_diagonal
from sophia.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

MEANS = [
    ("categorical", Categorical(), lambda z, y: F.cross_entropy(z, y.argmax(-1))),
    ("bernoulli", Bernoulli(), lambda z, y: F.binary_cross_entropy_with_logits(z, y)),
    ("gaussian", Gaussian(), lambda z, y: F.mse_loss(z, y)),
    ("poisson", Poisson(), lambda z, y: F.poisson_nll_loss(z, y)),
]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))


@pytest.mark.parametrize(("likelihood", "loss"), [m[1:] for m in MEANS], ids=[m[0] for m in MEANS])
def test_oracles_agree_on_a_mean(likelihood, loss):
    """An oracle that holds nothing: one of the two is wrong."""
    model, x, y = net(), torch.randn(6, 3), F.one_hot(torch.arange(6) % 5, 5).float()
    found = gauss_newton(model, (x, y), lambda m, data: m(data[0]), lambda z, data: loss(z, data[1]))
    at = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = gauss_newton_diagonal(
        lambda p: torch.func.functional_call(model, p, (x.double(),)), at, likelihood=likelihood
    )
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact)


def test_weights_and_several_outputs_by_hand():
    """W (diag(p) - p p^T) of each row, added up over two forwards, on a model of biases alone."""

    class Biases(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.5, 0.0, -1.0]))

        def forward(self, x):
            return x + self.bias

    model, x, w = Biases(), torch.randn(2, 4, 3), torch.rand(2, 4)
    y = torch.randint(0, 3, (2, 4))
    found = gauss_newton(
        model,
        (x, y, w),
        lambda m, data: [m(rows) for rows in data[0]],
        lambda z, data: sum(
            (c * F.cross_entropy(rows, t, reduction="none")).sum()
            for rows, t, c in zip(z, data[1], data[2], strict=True)
        ),
    )
    p = torch.softmax((x + model.bias.detach()).double(), -1)
    torch.testing.assert_close(found["bias"], (w.double()[..., None] * p * (1 - p)).sum((0, 1)))
