"""The oracles against each other, and the statistics on draws whose bias and noise are known."""

import pytest
import torch

from sophia.curvature import EmpiricalFisher, GaussNewtonBartlett, Hutchinson
from sophia.lab.experiments.estimators import experiment, tiny_oracles
from sophia.lab.experiments.framework import probing, small_language_model


@pytest.fixture(scope="module")
def model():
    return small_language_model.tiny(True, steps=5)


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(0)
    return small_language_model.windows(
        small_language_model.letters(True), 3, small_language_model.TINY.context, generator
    )


def test_three_ways_to_the_exact_diagonals_agree(model, ids):
    """A truth that is wrong makes every bias wrong. The Hessian also row by row; transformers takes the loss
    in float32, whence the tolerance.
    """
    gauss_newton = tiny_oracles.gauss_newton(model, ids)
    torch.testing.assert_close(tiny_oracles.all_labels(model, ids), gauss_newton, rtol=1e-9, atol=1e-14)
    hessian = tiny_oracles.hessian(model, ids)
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(input_ids=ids, labels=ids).loss
        gradient = tiny_oracles.flat(torch.autograd.grad(loss, parameters, create_graph=True))
    for i in (0, 200, 500, len(gradient) - 1):
        row = tiny_oracles.flat(
            torch.autograd.grad(gradient[i], parameters, retain_graph=True, materialize_grads=True)
        )
        torch.testing.assert_close(row[i], hessian[i], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("estimator", "target"), [(GaussNewtonBartlett(), "gauss_newton"), (Hutchinson(), "hessian")]
)
def test_the_mean_of_draws_is_what_is_estimated(model, ids, estimator, target):
    """Draws that are not the library's estimates of this loss. The distance of a mean of 400 draws is its
    noise, which is measured on the same draws; with 1.5 of it the bias is below the noise.
    """
    truth = getattr(tiny_oracles, target)(model, ids)
    draws = torch.stack(
        [tiny_oracles.flat(probing.estimate(estimator, model, ids, seed=i)) for i in range(400)]
    )
    found = experiment.against(draws, truth)
    assert found["distance"] < 1.5 * found["noise"]
    assert found["ratio"] == pytest.approx(1, abs=0.25)
    assert all(p.grad is None for p in model.parameters())


def test_the_empirical_fisher_is_count_times_the_squared_gradient(model, ids):
    """A record of another quantity under that name."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = tiny_oracles.flat([p.grad**2 for p in model.parameters()]) * ids[:, 1:].numel()
    model.zero_grad()
    found = tiny_oracles.flat(probing.estimate(EmpiricalFisher(), model, ids, seed=1))
    torch.testing.assert_close(found, expected)


def test_a_mean_estimate_is_the_mean_of_the_draws(model, ids):
    """A spectrum of one draw, which is wider than the curvature is."""
    mean = probing.mean_estimate(GaussNewtonBartlett(), model, ids, draws=3, seed=2)
    draws = [probing.estimate(GaussNewtonBartlett(), model, ids, seed=20_000 + i) for i in range(3)]
    expected = [sum(parts) / 3 for parts in zip(*draws, strict=True)]
    torch.testing.assert_close(mean, expected)
    assert not torch.equal(draws[0][0], draws[1][0])


def test_bias_and_noise_of_draws_that_are_known():
    """A bias called noise. 4096 draws of 100 coordinates around truth + 0.5, deviation 2: the norms have a
    standard error of 1.6%.
    """
    truth = torch.linspace(1, 3, 100, dtype=torch.float64)
    noise = torch.randn(4096, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = experiment.against(truth + 0.5 + 2 * noise, truth)
    size = float(truth.norm())
    assert found["bias"] == pytest.approx(5 / size, rel=0.05)
    assert found["noise"] == pytest.approx(2 * 10 / 64 / size, rel=0.05)
    assert found["error_of_mean"]["1"] == pytest.approx((425 / size**2) ** 0.5, rel=0.05)
    assert found["error_of_mean"]["1024"] == pytest.approx(((25 + 400 / 1024) / size**2) ** 0.5, rel=0.05)
    assert found["ratio"] == pytest.approx(1.25, rel=0.01)


def test_training_stops_before_each_step_and_trains():
    """A loop of its own that is not the lab's procedure, or weights looked at a step too late."""
    model = small_language_model.small(True)
    before = [p.detach().clone() for p in model.parameters()]
    source, shape = small_language_model.text(True), small_language_model.shape(True)
    losses, seen = [], []
    for step in small_language_model.training(
        model, "adamw", {"lr": 1e-2}, source, steps=12, batch=4, context=shape.context, seed=1
    ):
        seen.append(step)
        if step == 0:
            torch.testing.assert_close(list(model.parameters()), before, check_stride=False)
        ids = source.batch(seed=9, step=0, size=8, context=shape.context)
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert seen == list(range(13))
    assert losses[-1] < losses[0] - 0.1


def test_letters_are_the_most_frequent_bytes_and_one_for_the_rest():
    """An id that is no class of the model, or a text that says nothing."""
    ids = small_language_model.letters(True)
    counts = torch.bincount(ids, minlength=16)
    assert len(counts) == 16
    assert bool((counts[:15].diff() <= 0).all())
    assert counts.min() > 0
