"""Gauss-Newton-Bartlett against the exact Gauss-Newton diagonal: by enumeration of all labels, and by the
real sampler.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.curvature.exact import gauss_newton_diagonal
from sophia.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from sophia.refresh.seeds import generator
from tiny import ForcedLabels, weights_in_means

CLASSES, LENGTH, WIDTH = 4, 3, 5


class Chain(nn.Module):
    """Embedding, running sum, tanh, linear: predictions of one sequence share parameters and inputs."""

    def __init__(self, classes=CLASSES, width=WIDTH, std=0.9):
        super().__init__()
        self.embedding, self.out = nn.Embedding(classes, width), nn.Linear(width, classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(self, x, y=None):
        logits = self.out(torch.tanh(self.embedding(x).cumsum(1)))
        if y is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def exact_diagonal(model, x, mask, likelihood=None, weights=None):
    """The oracle, flat, float64."""
    by_name = gauss_newton_diagonal(
        lambda p: torch.func.functional_call(model, p, (x,))[0],
        dict(model.named_parameters()),
        likelihood=Categorical() if likelihood is None else likelihood,
        mask=mask,
        weights=weights,
    )
    return torch.cat([by_name[name].flatten() for name, _ in model.named_parameters()])


def estimate(optimizer, model):
    """The last estimate, flat: with beta2 = 0 the state is the estimate."""
    return torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()])


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("classes", "pairs", "micro_batches"), [(CLASSES, 0, 1), (CLASSES, 0, 2), (3, 1, 1), (3, 1, 2)]
)
def test_all_labels_weighted_by_their_probability_give_the_exact_diagonal(
    double, classes, pairs, micro_batches
):
    """A wrong B, mask, power or accumulation anywhere between the loop and the state would show here; and
    that the differences of two labels are unbiased is shown, not only claimed.
    """
    torch.manual_seed(0)
    model = Chain(classes)
    x = torch.randint(0, classes, (2, LENGTH))
    y = torch.tensor([[1, 2, -1], [0, -1, -1]])
    mask = y >= 0
    count = int(mask.sum())
    probabilities = torch.softmax(model(x)[0][mask], -1).detach()
    mean = 0.0
    for combination in itertools.product(range(classes), repeat=count * (1 + pairs)):
        labels = torch.tensor(combination).view((count, 2) if pairs else (count,))
        opt = Sophia(
            model, lr=0.0, weight_decay=0.0, betas=(0.9, 0.0), fraction=1.0, likelihood=ForcedLabels(labels)
        )
        for part in torch.arange(2).chunk(micro_batches):
            (model(x[part], y[part])[1] / micro_batches).backward()
        opt.step()
        opt.zero_grad()
        assert opt.stats()["B"] == count
        weight = probabilities.gather(1, labels.view(count, -1)).prod()
        mean = mean + weight * estimate(opt, model)
    weights = weights_in_means(mask, 2 // micro_batches) / micro_batches
    torch.testing.assert_close(mean, exact_diagonal(model, x, mask, weights=weights), rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def sampled():
    """Real labels from the optimizer's own sampler, many seeds; (model, x, y, exact diagonal, Jacobian
    route).
    """
    torch.manual_seed(0)
    model = Chain(classes=7, width=6, std=0.7)
    x = torch.randint(0, 7, (8, 5))
    y = torch.randint(0, 7, (8, 5))
    y[::2, 3:] = -1
    return model, x, y, exact_diagonal(model.double(), x, y >= 0).float(), model.float()


def test_mean_of_the_real_sampler_is_the_exact_diagonal(sampled):
    """8,000 refreshes through step(): the ratio of the sums has standard error 0.4%; the bounds are 7 of
    them.
    """
    model, x, y, exact, _ = sampled
    opt = Sophia(model, lr=0.0, weight_decay=0.0, betas=(0.9, 0.0), update_every=1, fraction=1.0, seed=3)
    total, draws = torch.zeros_like(exact), 8000
    for _ in range(draws):
        model(x, y)[1].backward()
        opt.step()
        opt.zero_grad()
        total += estimate(opt, model)
    ratio = float(total.sum() / draws / exact.sum())
    assert 0.97 < ratio < 1.03


def certain(model):
    """Make the most likely class about 97% likely."""
    with torch.no_grad():
        model.out.weight.mul_(3.2)


# Rows of a batch, how it is cut into micro-batches, what is done to the model.
DRAWS = {
    "equal inputs, one micro-batch": (8 * [[1, 1, 1]], [8], None),
    "equal inputs, four micro-batches": (8 * [[1, 1, 1]], [2, 2, 2, 2], None),
    "unequal micro-batches with padding": ([[0, 1, 2], [3, 3, 1], [2, 0, 0], [1, 2, 3]], [1, 3], None),
    "nearly certain predictions": (4 * [[0, 1, 2], [3, 3, 1]], [8], certain),
}


@pytest.mark.parametrize(("rows", "sizes", "prepare"), DRAWS.values(), ids=DRAWS)
def test_every_coordinate_of_many_draws(rows, sizes, prepare):
    """Noise that rows, micro-batches or steps share shows where the inputs are equal: cross terms stay.

    3,000 draws: the sum within 4 standard errors, every coordinate within 6.5 (both from the draws).
    """
    torch.manual_seed(4)
    model = Chain(std=0.6)
    if prepare is not None:
        prepare(model)
    x = torch.tensor(rows)
    y = x.clone()
    y[::3, 2:] = -1
    opt = Sophia(model, lr=0.0, weight_decay=0.0, betas=(0.9, 0.0), update_every=1, fraction=1.0, seed=8)
    draws = []
    for _ in range(3000):
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            model(xs, ys)[1].backward()
        opt.step()
        opt.zero_grad()
        draws.append(estimate(opt, model))
    drawn = torch.stack(draws).double()
    # The loop sums the means of its micro-batches and does not divide.
    exact = exact_diagonal(model.double(), x, y >= 0, weights=weights_in_means(y >= 0, sizes))
    total = drawn.sum(1)
    z = float((total.mean() - exact.sum()) / (total.std() / len(draws) ** 0.5))
    assert abs(z) < 4, z
    reached = exact > 1e-9 * exact.max()
    assert torch.equal(drawn.any(0), reached)
    errors = (drawn.mean(0) - exact)[reached] / (drawn.std(0)[reached] / len(draws) ** 0.5)
    assert float(errors.abs().max()) < 6.5


def mean_over_draws(one_draw, draws=1500):
    return sum(one_draw() for _ in range(draws)) / draws


@pytest.mark.parametrize(
    "mistake", ["last position only", "true labels", "padding counted", "sequences as B"]
)
def test_known_mistakes_fall_outside(sampled, mistake):
    """Negative controls: were these inside the bounds, the test above could not see anything."""
    model, x, y, exact, _ = sampled
    mask, g = y >= 0, torch.Generator().manual_seed(9)

    def squared(logits, labels, factor):
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
        return factor * torch.cat([v.flatten() for v in gradients]).square()

    def drawn(logits):
        return torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=g)[:, 0]

    def one_draw():
        logits = model(x)[0]
        if mistake == "last position only":
            return squared(logits[:, -1], drawn(logits[:, -1]), int(mask.sum()))
        if mistake == "true labels":
            return squared(logits[mask], y[mask], int(mask.sum()))
        if mistake == "padding counted":
            return squared(logits.flatten(0, 1), drawn(logits.flatten(0, 1)), y.numel())
        return squared(logits[mask], drawn(logits[mask]), len(y))

    ratio = float(mean_over_draws(one_draw).sum() / exact.sum())
    assert not 0.97 < ratio < 1.03, ratio


SCALAR = [
    (Bernoulli(), F.binary_cross_entropy_with_logits),
    (Gaussian(), F.mse_loss),
    (Gaussian(sigma=2.0), F.mse_loss),
    (Poisson(), F.poisson_nll_loss),
]


@pytest.mark.parametrize(
    ("likelihood", "loss_of"), SCALAR, ids=lambda v: getattr(v, "__name__", type(v).__name__)
)
def test_scalar_likelihoods_are_unbiased_too(likelihood, loss_of):
    """Regression and yes-or-no losses would get the curvature of another loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    target = torch.rand(6, 2).round()
    by_name = gauss_newton_diagonal(
        lambda p: torch.func.functional_call(model, p, (x,)),
        dict(model.named_parameters()),
        likelihood=likelihood,
    )
    exact = torch.cat([by_name[name].flatten() for name, _ in model.named_parameters()])
    opt = Sophia(
        model, lr=0.0, betas=(0.9, 0.0), weight_decay=0.0, update_every=1, fraction=1.0, likelihood=likelihood
    )
    total, draws = torch.zeros_like(exact), 4000
    for _ in range(draws):
        loss_of(model(x), target).backward()
        opt.step()
        opt.zero_grad()
        total += estimate(opt, model)
    assert opt.stats()["B"] == target.numel()
    # One draw of the sum has relative standard deviation below 1, so the standard error is below 1.6%.
    assert abs(float(total.sum() / draws / exact.sum()) - 1) < 0.06


def test_mse_default_is_the_curvature_of_mse():
    """The default sigma would scale h for every regression user."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    found = gauss_newton_diagonal(
        lambda p: torch.func.functional_call(model, p, (x,)),
        dict(model.named_parameters()),
        likelihood=Gaussian(),
    )
    torch.testing.assert_close(found["weight"][0], 2 * x.square().mean(0))


@pytest.mark.parametrize("classes", [2, 63, 64, 65, 257])
def test_sampler_draws_the_softmax(classes):
    """Chi-square of 200,000 draws: labels that are not the model's own make the estimate something else."""
    torch.manual_seed(classes)
    logits = torch.randn(classes) * 2
    expected = torch.softmax(logits.double(), 0) * 200_000
    u = torch.rand(200_000, dtype=torch.float64, generator=generator(torch.device("cpu"), classes))
    draws = Categorical().draw(torch.softmax(logits, 0).expand(200_000, -1), u)
    counts = torch.bincount(draws, minlength=classes).double()
    chi2 = float(((counts - expected).square() / expected).sum())
    freedom = classes - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_sampler_reaches_rare_tokens_and_never_impossible_ones():
    """A float32 cumulative sum loses tokens below 6e-8; one of probability zero must not be drawn at the
    edges.
    """
    p = torch.zeros(3, 130)
    p[:, 1], p[:, 129] = 1 - 1e-9, 1e-9
    u = torch.tensor([0.0, 0.5, 1 - 5e-10], dtype=torch.float64)
    assert Categorical().draw(p, u).tolist() == [1, 1, 129]


@pytest.mark.parametrize("pairs", [0, 4])
def test_gradient_does_not_depend_on_the_chunk_size(monkeypatch, pairs):
    """Labels would change with the vocabulary's size relative to a constant."""
    logits, mask = torch.randn(5, 7, 11), torch.rand(5, 7) < 0.7

    def gradient():
        return Categorical(pairs=pairs).sampled_gradient(logits, mask, torch.Generator().manual_seed(1))

    whole = gradient()
    import sophia.likelihoods.sampling as module

    monkeypatch.setattr(module, "CHUNK", {"cpu": 22})
    assert torch.equal(whole, gradient())
    assert not (whole.abs().sum(-1) > 0)[~mask].any()
    assert (whole.abs().sum(-1) > 0)[mask].float().mean() > 0.9  # of four pairs not all are two of a kind
