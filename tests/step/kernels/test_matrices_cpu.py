"""The spectral step compiled around products in bfloat16, against the plain path in float64."""

import pytest
import torch

from sophia.step import polar
from sophia.step.kernels import choose, fused_cpu, in_place, matrices_cpu, single_tensor
from sophia.step.rules import SPECTRAL, StepSettings

needs_it = pytest.mark.skipif(fused_cpu.unavailable() is not None, reason=str(fused_cpu.unavailable()))
SETTINGS = StepSettings(SPECTRAL, lr=0.1, beta1=0.8, gamma=0.0, eps=1e-8, weight_decay=0.2, scale=0.5)
SHAPES = [(1, 1), (1, 40), (40, 1), (16, 16), (24, 96), (96, 24), (33, 50), (300, 170)]


def columns(shape, size=1.0, seed=0):
    """Rows and columns of sizes apart by a hundred; theta, g, m."""
    generator = torch.Generator().manual_seed(seed)
    uneven = torch.logspace(-1, 0, shape[0])[:, None] * torch.logspace(0, -1, shape[1])
    made = [torch.randn(shape, generator=generator) for _ in range(3)]
    return [made[0], size * uneven * made[1], size * uneven * made[2]]


def stepped(kernel, row, settings=SETTINGS):
    row = [t.clone() for t in row]
    kernel.step(*([t] for t in row), [{}], settings)
    return row


@needs_it
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_is_the_rule_up_to_the_rounding_of_the_products(shape, threads, maximize, monkeypatch):
    monkeypatch.setattr(fused_cpu, "threads_for", lambda elements: threads)
    row, settings = columns(shape), SETTINGS._replace(maximize=maximize)
    p, _, m = stepped(matrices_cpu, row, settings)
    exact_p, _, exact_m = stepped(single_tensor, [t.double() for t in row], settings)
    torch.testing.assert_close(m.double(), exact_m, rtol=1e-6, atol=1e-7)
    moved, exact = (q.double() - (1 - 0.1 * 0.2) * row[0].double() for q in (p, exact_p))
    assert float((moved - exact).norm() / exact.norm()) < 0.03
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.1 * 0.5, rel=1e-3)


@needs_it
@pytest.mark.parametrize("most", [1, 2 * 24 * 96, 2**20])
def test_together_they_move_as_each_does_alone(most, monkeypatch):
    """A matrix scaled by the size of another, or its move given to a neighbour."""
    monkeypatch.setattr(matrices_cpu, "_TOGETHER", most)
    shapes = [(24, 96), (96, 24), (24, 96), (24, 24), (96, 24), (24, 96), (24, 96)]
    rows = [columns(shape, size=10.0 ** (-4 * i), seed=i) for i, shape in enumerate(shapes)]
    rows[2][1:] = [torch.zeros(24, 96), torch.zeros(24, 96)]
    rows[5][1][3, 4] = float("nan")
    moved = [[t.clone() for t in row] for row in rows]
    matrices_cpu.step(*map(list, zip(*moved, strict=True)), [{}] * len(rows), SETTINGS)
    for i, (row, (p, _, m)) in enumerate(zip(rows, moved, strict=True)):
        if i == 5:
            assert p.isnan().all()
            continue
        alone, _, own_m = stepped(matrices_cpu, row)
        assert torch.equal(m, own_m)
        assert float((p - alone).norm()) <= 0.03 * float((alone - (1 - 0.1 * 0.2) * row[0]).norm())


@needs_it
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-60, 2.0**50, 2.0**100])
def test_the_size_of_the_momentum_does_not_matter(size):
    """Squares beyond float32 either way."""
    row = columns((20, 60))
    p, scaled = (stepped(matrices_cpu, [row[0], k * row[1], k * row[2]])[0] for k in (1.0, size))
    assert torch.equal(p, scaled)


@needs_it
def test_still_where_nothing_moves_and_finite_where_little_is_left():
    p, g, m = columns((20, 60))
    zero = torch.zeros_like(g)
    assert torch.equal(stepped(matrices_cpu, [p, zero, zero])[0], (1 - 0.1 * 0.2) * p)
    assert stepped(matrices_cpu, [p, zero, 1e-44 * torch.ones_like(m)])[0].isfinite().all()


@needs_it
def test_what_is_not_finite_reaches_the_weights():
    """As in torch: a NaN that is swallowed is found when it is late."""
    p, g, m = columns((20, 60))
    g[3, 4] = float("nan")
    assert stepped(matrices_cpu, [p, g, m])[0].isnan().all()


@needs_it
def test_who_takes_this_path(monkeypatch):
    monkeypatch.setattr(matrices_cpu, "multiplies_bfloat16", lambda device: True)
    group = {"foreach": None, "fused": None, "differentiable": False}
    row = (*columns((4, 6)), {})
    assert choose(SPECTRAL, group, 0.1, row) is matrices_cpu
    others = [
        ({"fused": False}, 0.1, row, in_place),
        ({"foreach": True}, 0.1, row, in_place),
        ({"foreach": False}, 0.1, row, single_tensor),
        ({"differentiable": True}, 0.1, row, single_tensor),
        ({}, torch.tensor(0.1), row, single_tensor),
        ({}, 0.1, (*(t.double() for t in row[:3]), {}), in_place),
        ({}, 0.1, (*(t.mT for t in row[:3]), {}), in_place),
        ({}, 0.1, (row[0], row[1], row[2].bfloat16(), {}), single_tensor),
    ]
    for changed, lr, tensors, path in others:
        assert choose(SPECTRAL, {**group, **changed}, lr, tensors) is path
    monkeypatch.setattr(matrices_cpu, "multiplies_bfloat16", lambda device: False)
    assert choose(SPECTRAL, group, 0.1, row) is in_place


def test_the_answer_about_bfloat16_is_the_machines():
    """False is right anywhere; True only with instructions."""
    assert polar.multiplies_bfloat16(torch.device("meta")) is False
    assert isinstance(polar.multiplies_bfloat16(torch.device("cpu")), bool)


@needs_it
def test_autograd_learns_of_the_change():
    p, g, m = columns((4, 6))
    p.requires_grad_()
    loss = (p * p).sum()
    with torch.no_grad():
        matrices_cpu.step([p], [g], [m], [{}], SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
