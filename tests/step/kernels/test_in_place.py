"""The step without new tensors, against the plain path: several steps of each rule that has no curvature."""

import pytest
import torch

from sophia.step import second_moments
from sophia.step.kernels import in_place, single_tensor
from sophia.step.rules import FACTORED, SPECTRAL, WHITENED, StepSettings

SHAPES = {
    "spectral": [(6, 10), (10, 6)],
    "whitened": [(6, 10), (10, 6)],
    "factored": [(6, 10), (10, 6), (7,), (2, 3, 4)],
}


def states_of(rule, shapes):
    return [
        {name: torch.zeros(shape, dtype=torch.float64) for name, shape in rule.statistics.shapes(s).items()}
        | {"exp_avg": torch.zeros(s, dtype=torch.float64)}
        for s in shapes
    ]


@pytest.mark.parametrize("rule", [SPECTRAL, WHITENED, FACTORED], ids=lambda rule: rule.name)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_it_is_the_plain_step(rule, maximize, layout):
    """An average renewed twice, a decay of what has moved, a correction left out."""
    shapes = SHAPES[rule.name]
    generator = torch.Generator().manual_seed(0)
    settings = StepSettings(
        rule, 0.03, 0.8, 0.0, 1e-8, 0.2, maximize, rule.damping, 0.7, beta2=0.9, every=rule.update_every
    )

    def laid(t):
        return t.mT.contiguous().mT if layout == "columns" and t.ndim > 1 else t

    start = [laid(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    runs = []
    for kernel in (single_tensor, in_place):
        params, states = [p.clone() for p in start], states_of(rule, shapes)
        draw = torch.Generator().manual_seed(1)
        for _ in range(7):
            grads = [laid(torch.randn(s, generator=draw, dtype=torch.float64)) for s in shapes]
            kernel.step(params, grads, [s["exp_avg"] for s in states], states, settings)
        runs.append((params, states))
    for ours, plain in zip(runs[1][0], runs[0][0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)
    for ours, plain in zip(runs[1][1], runs[0][1], strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 50), (50, 6), (6, 11), (5, 5), (1, 40), (40, 1)])
def test_a_table_that_moves_piece_by_piece_moves_as_a_whole(shape, monkeypatch):
    """Rows left out or moved twice, or a last piece that is shorter than the short side and so transposed."""
    start, draw = torch.randn(shape, dtype=torch.float64), torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(4)]
    settings = StepSettings(FACTORED, 0.03, 0.8, 0.0, 1e-8, 0.2, damping=1e-6, scale=0.7, beta2=0.9, every=2)
    ends = []
    for kernel, piece in ((single_tensor, 10**9), (in_place, 1), (in_place, 30)):
        monkeypatch.setattr(second_moments, "_PIECE", piece)
        param, (state,) = start.clone(), states_of(FACTORED, [shape])
        for grad in grads:
            kernel.step([param], [grad], [state["exp_avg"]], [state], settings)
        ends.append((param, state["mean_squares"]))
    for param, squares in ends[1:]:
        torch.testing.assert_close(param, ends[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(squares, ends[0][1], rtol=1e-12, atol=0)
    monkeypatch.setattr(second_moments, "_PIECE", 30)
    assert len(list(second_moments._parts(50, 6))) > 2


@pytest.mark.parametrize(
    ("row", "serves"),
    [
        ([torch.zeros(3, 4)] * 3, True),
        ([torch.zeros(3, 4).T] * 3, True),
        ([torch.nn.Parameter(torch.zeros(3)), torch.zeros(3), torch.zeros(3)], True),
        ([torch.zeros(3, 4, dtype=torch.bfloat16)] * 3, False),
        ([torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)], False),
        ([torch.zeros(3, 4), torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4)], False),
    ],
)
def test_who_is_served(row, serves):
    assert in_place.applies(*row) is serves
