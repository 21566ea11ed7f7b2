"""The toy of section 2.1 against differentiation by torch.func, and methods against closed forms."""

import pytest
import torch

from sophia.lab.experiments import toy_landscape as toy


def points(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_gradient_and_curvature_are_those_of_the_loss():
    """A slip of the pen in a derivative would make another landscape."""
    theta = torch.randn(20, 2, dtype=torch.float64)
    first = torch.func.vmap(torch.func.grad(toy.loss))(theta)
    second = torch.func.vmap(torch.func.hessian(toy.loss))(theta)
    torch.testing.assert_close(toy.gradient(theta), first)
    torch.testing.assert_close(toy.curvature(theta), second.diagonal(dim1=-2, dim2=-1))
    assert not second[:, 0, 1].any()


@pytest.mark.parametrize(
    ("point", "value", "sharpness"),
    [((1.0, 4.0), 0.0, 68.8), ((0.0, 4.0), 8.0, -27.2), ((-0.6541, 4.0), 5.43, 45.0)],
)
def test_minimum_saddle_and_worse_minimum_are_where_the_page_says(point, value, sharpness):
    """Being stuck at the saddle would be about some other point."""
    theta = points(point)
    assert float(toy.loss(theta)) == pytest.approx(value, abs=0.01)
    assert float(toy.curvature(theta)[0, 0]) == pytest.approx(sharpness, abs=0.1)
    torch.testing.assert_close(toy.gradient(theta), torch.zeros(1, 2, dtype=torch.float64), atol=0.02, rtol=0)


def test_newton_goes_to_the_saddle_and_sophia_by_hand_does_not():
    """The picture would show something else than the two methods."""
    start = points(toy.START)
    torch.testing.assert_close(toy.trajectory("Newton", 1.0, start, 30)[-1], points((0.0, 4.0)))
    theta = start[0]
    for _ in range(8):  # clip(g / max(h, 0), lr) coordinate by coordinate
        g, h = toy.gradient(theta[None])[0], toy.curvature(theta[None])[0]
        moves = [
            max(-0.5, min(0.5, gi / hi)) if hi > 0 else 0.5 * (gi > 0) - 0.5 * (gi < 0)
            for gi, hi in zip(g.tolist(), h.tolist(), strict=True)
        ]
        theta = theta - points(moves)[0]
    torch.testing.assert_close(toy.trajectory("Sophia", 0.5, start, 8)[-1, 0], theta)


def test_steps_to_a_target():
    """A start that never arrives, counted as one that does."""
    losses = points((5.0, 5.0, 0.0), (0.0, 5.0, 0.0), (0.001, 5.0, 0.0), (5.0, 5.0, 0.0), (0.001, 5.0, 0.0))
    assert toy.settled(0.01, losses) == [4, None, 0]
