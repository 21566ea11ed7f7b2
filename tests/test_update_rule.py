"""The four pure functions against float64 numpy, vectors derived by hand, the official rule, and the limits
in which Sophia becomes a known method.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import array, official_step, paper_step
from sophia.update_rule import average_curvature, average_gradient, clipped_direction, sophia_step

DOUBLE = torch.float64
SETTINGS = {"lr": 0.1, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.0}

finite = st.floats(-1e3, 1e3, allow_subnormal=False)
positive = st.floats(1e-6, 1e3)


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


# Derived with pencil and paper from Algorithm 3; every line is one coordinate.
BY_HAND = {
    # theta, g, m, h | lr, beta1, gamma, eps, wd | theta', m'
    # m' = .5*0 + .5*2 = 1, gamma h = 2, half of lr
    "unclipped": ((1, 2, 0, 40), (0.1, 0.5, 0.05, 1e-12, 0), (0.95, 1)),
    # m' = .9*1 + .1*(-4) = .5, gamma h = .1: the ratio 5 is clipped
    "clipped": ((1, -4, 1, 2), (0.1, 0.9, 0.05, 1e-12, 0), (0.9, 0.5)),
    # m' = -.75, gamma h = 1.5, ratio -.5: theta grows by half of lr
    "negative momentum": ((0, -1, -0.5, 3), (0.2, 0.5, 0.5, 1e-12, 0), (0.1, -0.75)),
    # (1 - .1*.2) * 2 = 1.96, then m' = 1 over gamma h = 2 takes .05
    "decay first": ((2, 2, 0, 40), (0.1, 0.5, 0.05, 1e-12, 0.2), (1.91, 1)),
    # decay alone is not clipped: 10 * (1 - .5*.8) = 6, and no gradient
    "decay is never clipped": ((10, 0, 0, 1), (0.5, 0.9, 1, 1e-12, 0.8), (6, 0)),
    # gamma h = -2 < eps = 4: the floor is the denominator, 1 / 4
    "eps is a floor": ((0, 2, 0, -40), (0.1, 0.5, 0.05, 4, 0), (-0.025, 1)),
    # gamma h = 2 > eps = 1: the floor is a maximum, not a summand (a sum would give .1 / 3)
    "eps is not added": ((0, 2, 0, 40), (0.1, 0.5, 0.05, 1, 0), (-0.05, 1)),
    # both zero: 0 / eps
    "unseen coordinate": ((3, 0, 0, 0), (0.1, 0.9, 0.05, 1e-12, 0), (3, 0)),
}


@pytest.mark.parametrize(("start", "settings", "end"), BY_HAND.values(), ids=BY_HAND)
def test_vectors_by_hand(start, settings, end):
    """A sign, an order or a factor wrong in the equation."""
    names = ("lr", "beta1", "gamma", "eps", "weight_decay")
    theta, m = sophia_step(*(tensor(v) for v in start), **dict(zip(names, settings, strict=True)))
    torch.testing.assert_close(torch.cat([theta, m]), tensor(*end), rtol=1e-14, atol=1e-15)


def test_averages_by_hand():
    """The weights of an average swapped: m and h would jump to the newest value."""
    assert average_gradient(tensor(2), tensor(10), beta1=0.75).item() == 4
    assert average_curvature(tensor(2), tensor(10), beta2=0.75).item() == 4


@given(
    theta=finite,
    g=finite,
    m=finite,
    h=st.floats(-10, 1e4),
    lr=st.floats(0, 2),
    beta1=st.floats(0, 0.999),
    gamma=positive,
    eps=st.floats(1e-15, 1),
    wd=st.floats(0, 1),
)
def test_any_coordinate_equals_numpy(theta, g, m, h, lr, beta1, gamma, eps, wd):
    """A value somewhere for which torch's operations mean something else than the printed equation."""
    settings = {"lr": lr, "beta1": beta1, "gamma": gamma, "eps": eps, "weight_decay": wd}
    found = sophia_step(tensor(theta), tensor(g), tensor(m), tensor(h), **settings)
    expected = paper_step(*(np.array([v]) for v in (theta, g, m, h)), **settings)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(f), e, rtol=1e-12, atol=1e-12 * (1 + abs(theta)))


def test_averages_equal_numpy():
    """M or h of a whole tensor averaged with broadcast or truncation."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    for beta in (0.0, 0.96, 0.99):
        expected = beta * a + (1 - beta) * b
        for found in (
            average_gradient(torch.from_numpy(a), torch.from_numpy(b), beta1=beta),
            average_curvature(torch.from_numpy(a), torch.from_numpy(b), beta2=beta),
        ):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)


def test_nothing_is_changed_in_place():
    """A "pure" function that writes into the caller's parameters or state."""
    tensors = [torch.randn(5, dtype=DOUBLE) for _ in range(4)]
    before = [t.clone() for t in tensors]
    sophia_step(*tensors, **{**SETTINGS, "weight_decay": 0.1})
    average_gradient(*tensors[:2], beta1=0.5)
    average_curvature(*tensors[:2], beta2=0.5)
    clipped_direction(*tensors[:2], gamma=1.0, eps=1e-12)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


# ---- the official repository


# bs = 4, rho = 0.5 throughout, so rho bs h_off = 2 h_off; lr = 0.1, beta1 = 0.5.
OFFICIAL = {
    # theta, g, m, h_off, wd | theta', m'
    # m' = .1, denominator .5, ratio .2; theta (1 - .02) - .02
    "unclipped": ((1, 0.1, 0.1, 0.25), 0.2, (0.96, 0.1)),
    # m' = -3, denominator .5, ratio 6 clamped to 1
    "clipped": ((1, -6, 0, 0.25), 0.0, (1.1, -3)),
    # h_off = 0, denominator 1e-15: sign
    "no curvature": ((1, 1e-6, 0, 0), 0.0, (0.9, 5e-7)),
}


@pytest.mark.parametrize(("start", "wd", "end"), OFFICIAL.values(), ids=OFFICIAL)
def test_official_vectors_by_hand(start, wd, end):
    """gamma, or the place of B, meaning something else here than rho and bs there."""
    theta, g, m, h_off = (tensor(v) for v in start)
    found = sophia_step(theta, g, m, 4 * h_off, lr=0.1, beta1=0.5, gamma=0.5, eps=1e-15, weight_decay=wd)
    torch.testing.assert_close(torch.cat(found), tensor(*end), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bs", [1, 480, 491_520])
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_official_trajectory(bs, wd):
    """Users of the official code would need other hyper-parameters for the same run."""
    rng = np.random.default_rng(bs)
    theta, m, h_off = rng.normal(size=50), np.zeros(50), np.zeros(50)
    theirs, ours = (theta, m), (torch.from_numpy(theta), torch.from_numpy(m))
    h = torch.from_numpy(h_off)
    for step in range(30):
        if step % 10 == 0:  # their buffer averages the squared mean gradient, ours B times that
            squared = rng.normal(size=50) ** 2 * 10.0 ** rng.uniform(-9, 0, size=50)
            h_off = 0.99 * h_off + 0.01 * squared
            h = average_curvature(h, torch.from_numpy(bs * squared), beta2=0.99)
        g = rng.normal(size=50) * 1e-2
        theirs = official_step(
            theirs[0], g, theirs[1], h_off, lr=6e-4, beta1=0.96, rho=0.05, bs=bs, weight_decay=wd
        )
        ours = sophia_step(
            ours[0], torch.from_numpy(g), ours[1], h,
            lr=6e-4, beta1=0.96, gamma=0.05, eps=1e-15, weight_decay=wd,
        )  # fmt: skip
    np.testing.assert_allclose(ours[0].numpy(), theirs[0], rtol=0, atol=1e-11)
    np.testing.assert_allclose(ours[1].numpy(), theirs[1], rtol=1e-12)


def test_version_1_of_the_paper():
    """The symbol table: eta clip(m / max(h, eps), rho) of v1 is ours with lr = eta rho, gamma = rho."""
    eta, rho, eps = 0.02, 0.04, 1e-8
    m, h = torch.randn(200, dtype=DOUBLE), torch.rand(200, dtype=DOUBLE) * 50 - 5
    v1 = eta * np.clip(array(m) / np.maximum(array(h), eps), -rho, rho)
    ours = eta * rho * clipped_direction(m, h, gamma=rho, eps=rho * eps)
    assert 0.1 < float((ours.abs() < eta * rho).double().mean()) < 0.9  # both regimes are in the sample
    np.testing.assert_allclose(ours.numpy(), v1, rtol=1e-12)


# ---- limits


@pytest.mark.parametrize("h", [0.0, -1e-9, -5.0, -1e30])
def test_without_curvature_it_is_sign_momentum(h):
    """Coordinates with zero or negative curvature: a Newton step would blow up or go uphill."""
    theta, g, m = (torch.randn(100, dtype=DOUBLE) for _ in range(3))
    new, m1 = sophia_step(theta, g, m, torch.full_like(m, h), **SETTINGS)
    assert torch.equal(new, theta - 0.1 * torch.sign(m1))


def test_far_from_the_clip_it_is_newton_with_momentum():
    """A huge gamma never clips: theta moves by lr / gamma times the diagonal Newton step."""
    gamma = 1e6
    theta, m = torch.randn(50, dtype=DOUBLE), torch.zeros(50, dtype=DOUBLE)
    h = torch.rand(50, dtype=DOUBLE) + 0.1
    newton, average = array(theta), np.zeros(50)
    for seed in range(5):
        g = torch.randn(50, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        theta, m = sophia_step(theta, g, m, h, **{**SETTINGS, "lr": 0.3 * gamma, "gamma": gamma})
        average = 0.9 * average + 0.1 * array(g)
        newton = newton - 0.3 * average / array(h)
    np.testing.assert_allclose(theta.numpy(), newton, rtol=1e-12, atol=1e-14)


def test_one_newton_step_ends_at_the_minimum_of_a_quadratic():
    """Curvature used with a wrong power: badly scaled quadratics would need more than one step."""
    curvature, minimum = tensor(1e-4, 1, 1e4), tensor(3, -2, 0.5)
    theta = tensor(2, 5, 1)
    settings = {**SETTINGS, "lr": 1e6, "gamma": 1e6, "beta1": 0.0}
    theta, _ = sophia_step(
        theta, curvature * (theta - minimum), torch.zeros(3, dtype=DOUBLE), curvature, **settings
    )
    torch.testing.assert_close(theta, minimum, rtol=1e-9, atol=1e-9)


def test_equal_curvature_and_no_clip_is_momentum_sgd():
    """Torch's SGD with momentum and dampening equal to beta1 is the oracle; lr / (gamma h) is its lr."""
    h, lr, gamma = 2.0, 0.1, 500.0
    p = torch.nn.Parameter(torch.randn(20, dtype=DOUBLE))
    theta, m = p.detach().clone(), torch.zeros(20, dtype=DOUBLE)
    sgd = torch.optim.SGD([p], lr=lr / (gamma * h), momentum=0.9, dampening=0.9)
    for step in range(6):
        g = torch.randn(20, dtype=DOUBLE)
        # torch starts its average at the first gradient instead of at zero times beta plus the rest.
        p.grad = g * 0.1 if step == 0 else g
        sgd.step()
        theta, m = sophia_step(theta, g, m, torch.full_like(g, h), **{**SETTINGS, "gamma": gamma})
    torch.testing.assert_close(theta, p.detach(), rtol=1e-13, atol=1e-14)


@given(theta=finite, g=finite, m=finite, h=st.floats(-1e3, 1e3), gamma=positive, lr=st.floats(1e-6, 10))
def test_no_coordinate_moves_by_more_than_lr(theta, g, m, h, gamma, lr):
    """The promise that makes Sophia safe at a bad estimate of the curvature."""
    new, _ = sophia_step(
        tensor(theta), tensor(g), tensor(m), tensor(h), **{**SETTINGS, "gamma": gamma, "lr": lr}
    )
    assert abs(new.item() - theta) <= lr * (1 + 1e-12) + 1e-13 * abs(theta)


@given(m=finite, h=st.floats(-1e3, 1e3), gamma=positive)
def test_direction_is_odd_in_m_and_never_uphill(m, h, gamma):
    """A rule that treats positive and negative gradients differently."""
    forward = clipped_direction(tensor(m), tensor(h), gamma=gamma, eps=1e-12).item()
    assert forward == -clipped_direction(tensor(-m), tensor(h), gamma=gamma, eps=1e-12).item()
    assert forward * m >= 0
    assert abs(forward) <= 1
