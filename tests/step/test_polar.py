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


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (33, 100), (1, 40), (40, 1), (30, 31), (64, 64)])
def test_it_is_the_plain_iteration(shape):
    x = spread(shape, orders=1)
    assert error(short_side.polar_of(x), polar(x)) < 1e-12
    assert error(short_side.polar_of(x.float()), polar(x)) < 1e-5


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_singular_values_lose_little_in_single_precision(scale):
    """Momentum is like that; six orders are all that float32 holds."""
    x = spread((64, 256), orders=6)
    assert error(short_side.polar_of((scale * x).float()), polar(x)) < 1e-3


def test_a_matrix_without_full_rank_stays_bounded():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    got = short_side.polar_of(x)
    assert torch.linalg.matrix_norm(got, 2) < 1.3
    torch.testing.assert_close(got, polar(x), atol=2e-4, rtol=0)
    assert torch.equal(short_side.polar_of(torch.zeros(4, 9)), torch.zeros(4, 9))


def test_the_plain_way_where_it_is_shorter_or_safer(monkeypatch):
    calls = []
    monkeypatch.setattr(short_side, "polar", lambda x: calls.append(x.shape) or x)
    short_side.polar_of(torch.ones(8, 11))
    short_side.polar_of(torch.ones(8, 12))
    short_side.polar_of(torch.ones(8, 40, dtype=torch.bfloat16))
    assert calls == [(8, 11), (8, 40)]


def test_the_direction_is_the_same():
    u = spread((20, 80), orders=3)
    fast = spectral_direction(u, power=1 / 4, polar_of=short_side.polar_of)
    torch.testing.assert_close(fast, spectral_direction(u, power=1 / 4), rtol=1e-9, atol=1e-10)
