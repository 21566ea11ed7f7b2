"""Hutchinson and the empirical Fisher against the exact Hessian, and the interface for the user's own
estimator.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.curvature import EmpiricalFisher, Estimate, Estimator, Hutchinson
from sophia.curvature.exact import hessian_diagonal
from tiny import GPT, data


class Quadratic(nn.Module):
    """Loss ``x^T A x / 2`` returned as the model's own; "logits" are the parameter itself."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix, self.x = matrix, nn.Parameter(torch.ones(1, len(matrix)))

    def forward(self, _):
        return self.x * 1.0, (self.x @ self.matrix * self.x).sum() / 2


def mean_estimate(model, inputs, estimator, draws, **settings):
    """Mean over many refreshes of the estimate, as it arrives in the state."""
    opt = Sophia(
        model,
        lr=0.0,
        betas=(0.9, 0.0),
        weight_decay=0.0,
        update_every=1,
        fraction=1.0,
        estimator=estimator,
        mask_fn=lambda args, kwargs, output: torch.ones(output[0].shape[:-1], dtype=torch.bool),
        **settings,
    )
    total = 0.0
    for _ in range(draws):
        model(*inputs)[1].backward()
        opt.step()
        opt.zero_grad()
        total = total + torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()])
    return total / draws


def test_one_rademacher_probe_is_exact_on_a_diagonal_hessian():
    """Any scale error (a lost 1/2, a count) would show without noise."""
    diagonal = torch.tensor([1.0, -2.0, 30.0, 0.5])
    found = mean_estimate(Quadratic(diagonal.diag()), (torch.zeros(1),), "hutchinson", 1)
    torch.testing.assert_close(found, diagonal)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_mean_is_the_diagonal_of_a_full_hessian(distribution):
    """Off-diagonal entries must average out; the tolerance is five standard errors of 3,000 draws."""
    torch.manual_seed(0)
    root = torch.randn(5, 5)
    matrix = root @ root.T
    found = mean_estimate(Quadratic(matrix), (torch.zeros(1),), Hutchinson(distribution=distribution), 3000)
    noise = matrix.square().sum(1) * 2 / 3000
    assert ((found - matrix.diag()).abs() < 5 * noise.sqrt()).all()


class TinyNet(nn.Module):
    """Two linear layers with a cross-entropy inside; 27 parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x, y):
        logits = self.b(torch.tanh(self.a(x)))
        return logits, F.cross_entropy(logits, y)


def test_mean_is_the_diagonal_of_the_hessian_of_a_model():
    """Hutchinson is for the Hessian, not the Gauss-Newton matrix: negative entries included."""
    torch.manual_seed(0)
    model, x, y = TinyNet(), torch.randn(12, 2), torch.randint(0, 3, (12,))
    by_name = hessian_diagonal(
        lambda p: torch.func.functional_call(model, p, (x, y))[1], dict(model.named_parameters())
    )
    exact = torch.cat([by_name[name].flatten() for name, _ in model.named_parameters()])
    assert (exact < 0).any()
    # Twice the probes that torch 2.13 needs, as the bernoulli_ of 2.6 draws others.
    means = torch.stack([mean_estimate(model, (x, y), "hutchinson", 500, seed=seed) for seed in range(16)])
    error, standard = (means.mean(0) - exact).norm(), (means.std(0) / 16**0.5).norm()
    assert float(error / exact.norm()) < 0.05
    assert float(error / standard) < 2.5  # what the spread of the means leaves: no bias


def test_micro_batches_are_weighted_by_what_they_count():
    """Uneven padding would tilt the Hessian towards the short micro-batches."""
    x, y = data(8, padded=True)
    diagonals = []
    for parts in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):
        model = GPT(layers=1)
        opt = Sophia(model, fraction=1.0, estimator="hutchinson")
        for part in parts:
            weight = float((y[part] >= 0).sum() / (y >= 0).sum())
            (model(x[part], y[part])[1] * weight).backward()
        opt.step()
        assert opt.stats()["B"] == int((y >= 0).sum())
        diagonals.append(torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]))
    assert float((diagonals[0] - diagonals[1]).norm() / diagonals[0].norm()) < 1e-5


def test_fused_attention_is_left_alone_outside_the_pass():
    """The plain attention of the pass must not slow the training forward."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    before = _cur_sdpa_kernel_backends()
    model = GPT()
    opt = Sophia(model, estimator="hutchinson")
    model(*data(4))[1].backward()
    opt.step()
    assert _cur_sdpa_kernel_backends() == before
    assert opt.stats()["refreshes"] == 1


def test_a_model_without_a_loss_is_told_what_to_do():
    """The Hessian needs the loss; a silent fall-back to another one would not be Hutchinson."""
    model, (x, y) = GPT(), data(4)
    opt = Sophia(model, estimator="hutchinson")
    F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).backward()
    with pytest.raises(
        RuntimeError, match=r"needs the training loss, but the model returned tuple without one.*loss_fn="
    ):
        opt.step()


def test_loss_fn_serves_a_loss_outside_the_model():
    """It would otherwise be impossible to use Hutchinson with a criterion in the loop."""
    x, y = data(4)

    def outside(output, args, kwargs):
        return F.cross_entropy(output[0].flatten(0, 1), y.flatten())

    states = []
    for inside in (True, False):
        model = GPT(layers=1)
        opt = Sophia(model, fraction=1.0, estimator="hutchinson" if inside else Hutchinson(loss_fn=outside))
        (model(x, y)[1] if inside else outside(model(x), (), {})).backward()
        opt.step()
        states.append(torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-9)


def test_empirical_fisher_is_count_times_the_squared_training_gradient():
    """The ablation would compare something else."""
    model, (x, y) = GPT(layers=1), data(4, padded=True)
    opt = Sophia(model, fraction=1.0, betas=(0.9, 0.0), estimator="empirical_fisher")
    for part in (slice(0, 1), slice(1, 4)):
        weight = float((y[part] >= 0).sum() / (y >= 0).sum())
        (model(x[part], y[part])[1] * weight).backward()
    count = int((y >= 0).sum())
    opt.step()
    for p in model.parameters():
        torch.testing.assert_close(opt.state[p]["hessian"], count * p.grad.square(), rtol=1e-3, atol=1e-9)
    assert isinstance(opt.estimator, EmpiricalFisher)


def test_maximize_flips_a_hessian_but_not_a_square():
    """Maximising L is minimising -L, whose Hessian has the other sign."""
    diagonal = torch.tensor([1.0, -2.0, 30.0])
    found = mean_estimate(Quadratic(diagonal.diag()), (torch.zeros(1),), "hutchinson", 1, maximize=True)
    torch.testing.assert_close(found, -diagonal)


def test_bad_distribution_is_named():
    """A misspelt distribution must not become a default."""
    with pytest.raises(ValueError, match="distribution='normal' is unknown: give 'rademacher' or 'gaussian'"):
        Hutchinson(distribution="normal")


class OfOneOrder(torch.autograd.Function):
    """A kernel with a backward that cannot be differentiated, as fused ones have it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_kernel_of_one_order_is_named():
    """Its part of the Hessian left out: autograd sees no way from there to a parameter, and says nothing."""
    x = nn.Parameter(torch.ones(3))
    opt = Sophia([x], mode="manual", estimator="hutchinson")
    with (
        pytest.raises(
            RuntimeError, match=r"Hutchinson's .*once differentiable.*Fused kernels.*estimator='gnb'"
        ),
        opt.hessian_pass() as hp,
    ):
        hp.add(OfOneOrder.apply(x).square().sum() + x.square().sum(), count=1)


def test_own_estimator_gets_the_batches_and_the_count():
    """The interface that researchers build on."""

    class GradientScale(Estimator):
        def estimate(self, context):
            assert len(context.micro_batches) == 2
            assert context.count == sum(b.count for b in context.micro_batches) == 8 * 16
            for batch in context.micro_batches:
                batch.loss(batch.forward()).backward()
            return Estimate([p.grad.abs() + 1 for p in context.parameters], context.count)

    model, (x, y) = GPT(), data(8)
    opt = Sophia(model, fraction=1.0, betas=(0.9, 0.0), estimator=GradientScale())
    for part in (slice(0, 4), slice(4, 8)):
        (model(x[part], y[part])[1] / 2).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert all((opt.state[p]["hessian"] >= 1).all() for p in model.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
    with pytest.raises(TypeError, match="GradientScale has no pass by hand"), opt.hessian_pass():
        pass


@pytest.mark.parametrize(
    ("kind", "expected"), [("estimator", "'newton' is unknown"), ("likelihood", "'poison' is unknown")]
)
def test_unknown_names_list_the_known(kind, expected):
    """A typing error must not choose a default."""
    with pytest.raises(ValueError, match=expected):
        Sophia(GPT(), **{kind: expected.split("'")[1]})
