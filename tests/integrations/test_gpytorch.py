"""docs/hosts/gpytorch.md: by hand, with Hutchinson, as the words of the first step say."""

import pytest
import torch
from pages import refreshed, run
from small_models import ESTIMATE

gpytorch = pytest.importorskip("gpytorch", reason="needs gpytorch (extra [hosts])")

from sophia import Sophia  # noqa: E402

X = torch.linspace(0, 1, 24)
Y = torch.sin(6 * X) + 0.1 * torch.cos(40 * X)


class GP(gpytorch.models.ExactGP):
    def __init__(self, likelihood):
        super().__init__(X, Y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


def model_and_likelihood():
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    return GP(likelihood).train(), likelihood


def test_page():
    """A pass by hand that is not seen, or a fit that does not get better."""
    model, likelihood = model_and_likelihood()
    names, steps = run("gpytorch.md", "The marginal likelihood", model=model, likelihood=likelihood, x=X, y=Y)
    assert [taken.step for taken in steps] == list(range(40))
    assert refreshed(steps) == [0, 10, 20, 30]
    assert {taken.counted for taken in steps} == {len(Y)}
    before, after = model_and_likelihood()[0], model
    assert names["mll"](after(X), Y) > gpytorch.mlls.ExactMarginalLogLikelihood(before.likelihood, before)(
        before(X), Y
    )


def difference_of_slopes(mll, model, parameter, by=1e-2):
    """The second derivative, from first ones: those of GPyTorch's kernels have none that is right."""
    slopes = []
    for step in (by, -by):
        parameter.data += step
        slopes.append(float(torch.autograd.grad(-mll(model(X), Y), parameter)[0].sum()))
        parameter.data -= step
    return (slopes[0] - slopes[1]) / (2 * by)


def test_h_by_hand_is_the_hessian_of_the_marginal_likelihood():
    """Signs and a scale that nothing else on the page would show."""
    model, likelihood = model_and_likelihood()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    parameters = list(model.parameters())
    exact = [difference_of_slopes(mll, model, p) for p in parameters]
    settings = {name: value for name, value in ESTIMATE.items() if name not in ("update_every", "fraction")}
    opt = Sophia(model, mode="manual", estimator="hutchinson", **settings)
    draws, found = 200, dict.fromkeys(parameters, 0.0)
    for _ in range(draws):
        with opt.hessian_pass() as hp, gpytorch.settings.trace_mode():
            hp.add(-mll(model(X), Y), count=len(Y))
        for p in parameters:
            found[p] += float(opt.state[p]["hessian"].sum()) / draws
        (-mll(model(X), Y)).backward()
        opt.step()
        opt.zero_grad()
    size = max(map(abs, exact))
    for p, value in zip(parameters, exact, strict=True):
        # Off-diagonal entries of either sign come in: none is larger than the largest of the diagonal here.
        assert found[p] == pytest.approx(value, abs=4 * size / draws**0.5)


def test_the_pass_of_many_points_is_exact_under_the_setting_of_the_page():
    """Conjugate gradients in the place of the Cholesky factor, which give another second derivative."""

    def h(*, many, log_prob):
        model, likelihood = model_and_likelihood()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        opt = Sophia(model, mode="manual", estimator="hutchinson")
        with (
            gpytorch.settings.max_cholesky_size(10 if many else 800),
            gpytorch.settings.fast_computations(log_prob=log_prob),
            gpytorch.settings.trace_mode(),
            opt.hessian_pass() as hp,
        ):
            hp.add(-mll(model(X), Y), count=len(Y))
        return torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()])

    few = h(many=False, log_prob=True)
    torch.testing.assert_close(h(many=True, log_prob=False), few, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(h(many=True, log_prob=True), few, rtol=0.1)


def test_a_replay_is_refused_with_the_way_out():
    """Words about training mode, where the cause is that GPyTorch's modules pass by all hooks."""
    model, likelihood = model_and_likelihood()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    opt = Sophia(model)
    (-mll(model(X), Y)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"its own __call__ passes by .*mode='manual'.*estimator='hutchinson'"
    ):
        opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
