"""The polar factor by the short side: the plain iteration is the truth."""

from __future__ import annotations

import pytest
import torch

from sophia.step import polar as short_side
from sophia.update_rule import polar, spectral_direction


def spread(shape, orders, seed=0):
    """A matrix whose singular values spread over so many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    left, values, right = torch.linalg.svd(
        torch.randn(shape, dtype=torch.float64, generator=generator), full_matrices=False
    )
    return left * torch.logspace(0, -orders, len(values), dtype=torch.float64) @ right


def error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def cosine(x, y):
    return float((x * y).sum() / x.norm() / y.norm())


def muons(x):
    """The five iterations of Jordan et al. (Muon, 2024)."""
    y = x / x.norm()
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return y


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def halves(request, monkeypatch):
    """Both kinds of machines: with instructions for bfloat16 and without."""
    monkeypatch.setattr(short_side, "multiplies_bfloat16", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (33, 100), (1, 40), (40, 1), (30, 31), (64, 64)])
def test_it_is_the_plain_iteration(shape, halves):
    x = spread(shape, orders=1)
    assert error(short_side.polar_of(x), polar(x)) < 1e-12
    assert error(short_side.polar_of(x.float()), polar(x)) < (0.05 if halves else 1e-5)


@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 768)])
@pytest.mark.parametrize("orders", [1.5, 3])
def test_it_is_near_the_exact_factor_of_what_momentum_is_like(shape, orders, halves):
    """A rounded singular value beyond the largest that the quintics know grows without bound; small ones are
    squares in the Gram matrix, lost in its rounding.
    """
    x = spread(shape, orders)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    got = short_side.polar_of(x.float()).double()
    assert cosine(got, left @ right) > (0.99 if orders < 2 else cosine(muons(x), left @ right) - 0.01)
    assert torch.linalg.matrix_norm(got, 2) < 1.15


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_singular_values_lose_little_in_single_precision(scale, monkeypatch):
    """Momentum is like that; six orders are all that float32 holds."""
    monkeypatch.setattr(short_side, "multiplies_bfloat16", lambda device: False)
    x = spread((64, 256), orders=6)
    assert error(short_side.polar_of((scale * x).float()), polar(x)) < 1e-3


def test_a_matrix_without_full_rank_stays_bounded(halves):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    got = short_side.polar_of(x)
    assert torch.linalg.matrix_norm(got, 2) < 1.15
    torch.testing.assert_close(got, polar(x), atol=0.05 if halves else 2e-4, rtol=0)
    assert torch.equal(short_side.polar_of(torch.zeros(4, 9)), torch.zeros(4, 9))


def test_two_iterations_at_a_time_where_that_is_shorter(monkeypatch):
    """The products of a wide matrix with itself, which are the dear ones: two in place of four."""
    plain, calls = short_side._iterations, []
    monkeypatch.setattr(
        short_side, "_iterations", lambda y, some, **k: calls.append(len(some)) or plain(y, some, **k)
    )
    for shape, expected in (((8, 11), [1] * 4), ((8, 12), [2] * 2), ((40, 8), [2] * 2)):
        calls.clear()
        short_side.polar_of(torch.ones(shape))
        assert calls == expected


def test_the_direction_is_the_same():
    u = spread((20, 80), orders=3)
    fast = spectral_direction(u, power=1 / 4, polar_of=short_side.polar_of)
    torch.testing.assert_close(fast, spectral_direction(u, power=1 / 4), rtol=1e-9, atol=1e-10)
