"""The damped rule compiled, in blocks and written down, against numpy in float64: a first step, which knows
no size yet, and one after it.
"""

import math

import numpy as np
import pytest
import torch

from sophia.step.kernels import damped_blocks, fused_cpu, single_tensor
from sophia.step.rules import DAMPED, StepSettings

needs_it = pytest.mark.skipif(fused_cpu.unavailable() is not None, reason=str(fused_cpu.unavailable()))

SETTINGS = {
    "lr": 0.01,
    "beta1": 0.9,
    "gamma": 0.3,
    "eps": 1e-12,
    "weight_decay": 0.1,
    "damping": 0.5,
    "scale": 0.4,
    "started": 0.19,
}
LENGTHS = [0, 1, 15, 33, 511, 5_000, 2**14 - 1, 2**14, 2**14 + 1, 2**17 + 5, 400_001]
STATES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


def columns(lengths, dtype=torch.float32, kept=torch.float32):
    """Coordinates of very different sizes, as an embedding has: a sum over some of them would be far off."""
    g = torch.Generator().manual_seed(0)
    scales = [torch.randn(n, generator=g).exp() for n in lengths]
    rows = [[torch.randn(n, generator=g) * s for n, s in zip(lengths, scales, strict=True)] for _ in range(4)]
    types = (dtype, dtype, kept, kept)
    made = [[t.to(kind) for t in row] for row, kind in zip(rows, types, strict=True)]
    made[3] = [h.abs() for h in made[3]]
    return made


def unknown(lengths, dtype=torch.float32):
    return [torch.zeros((), dtype=dtype) for _ in lengths]


def numpy_step(p, g, m, h, size, *, maximize=False):
    """Textbook arithmetic on arrays in float64; returns theta, m and the size for the next step."""
    b, s = 0.9, SETTINGS
    g = -g if maximize else g
    m = b * m + (1 - b) * g
    u = b * m + (1 - b) * g
    rms = math.sqrt((u**2).mean()) if u.size else 0.0
    floor = max(s["damping"] * (size * s["started"] or rms), s["eps"])
    direction = np.clip(u / np.maximum(s["gamma"] * h, floor), -1, 1)
    theta = (1 - s["lr"] * s["weight_decay"]) * p - s["lr"] * s["scale"] * direction
    return theta, m, rms / s["started"]


@torch.no_grad()
def check(step, dtype, kept, *, keys=None, **settings):
    """Two steps, the second with the size of the first and another gradient."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made, sizes = columns(LENGTHS, dtype, kept), unknown(LENGTHS, wide)
    maximize = settings.get("maximize", False)
    near = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for number in range(2):
        rows = [[t.double().numpy() for t in row] for row in zip(*made, strict=True)]
        known = [float(size) for size in sizes]
        expected = [numpy_step(*row, size, maximize=maximize) for row, size in zip(rows, known, strict=True)]
        step(*made, StepSettings(DAMPED, **{**SETTINGS, **settings}), sizes=sizes, keys=keys)
        for p, m, size, (theta, mean, rms) in zip(made[0], made[2], sizes, expected, strict=True):
            np.testing.assert_allclose(p.double().numpy(), theta, rtol=near[dtype], atol=near[dtype] / 4)
            np.testing.assert_allclose(m.double().numpy(), mean, rtol=near[kept], atol=near[kept] / 4)
            assert float(size) == pytest.approx(rms, rel=1e-6), number
        made[1] = [0.1 * g.flip(0) for g in made[1]]


@needs_it
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "kept"), STATES)
def test_equals_the_rule(dtype, kept, maximize):
    """A floor of another tensor or of this step, a piece twice or not at all, u without the look ahead."""
    noise = {"keys": list(range(len(LENGTHS)))} if kept == torch.bfloat16 else {}
    check(fused_cpu.step, dtype, kept, maximize=maximize, **noise)


@pytest.mark.parametrize("path", [damped_blocks, single_tensor])
def test_the_paths_without_it_equal_the_rule(path):
    """A run that goes on elsewhere, where no compiler was found, as another run."""
    check(path.step, torch.float32, torch.float32)


@needs_it
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_cannot_be_seen(threads):
    """A sum whose order depends on who adds; a small tensor on the cut that both walk through, or neither."""
    lengths = [40_000, 1, 90_003, 17, 65_536, 3, 300_000, 2_500_013, 100_000]

    def stepped(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            made, sizes = columns(lengths), unknown(lengths)
            for _ in range(2):
                fused_cpu.step(*made, StepSettings(DAMPED, **SETTINGS), sizes=sizes)
            return [*made[0], *made[2], *sizes]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(stepped(1), stepped(threads), strict=True))


@pytest.mark.parametrize("path", [pytest.param(fused_cpu, marks=needs_it), damped_blocks, single_tensor])
def test_what_is_no_number_stays_none(path):
    """A floor that hides a NaN gradient would let the rest of the tensor go on with steps of full size."""
    for length in (10, 200_000):
        made, sizes = columns([length]), unknown([length])
        made[1][0][3] = float("nan")
        path.step(*made, StepSettings(DAMPED, **SETTINGS), sizes=sizes)
        path.step(*made, StepSettings(DAMPED, **SETTINGS), sizes=sizes)
        assert made[0][0].isnan().all()


@pytest.mark.parametrize("path", [pytest.param(fused_cpu, marks=needs_it), damped_blocks, single_tensor])
def test_after_steps_without_a_gradient_the_first_one_is_no_sign_step(path):
    """A size of zero taken for the floor: all of lr for every coordinate, however small its gradient."""
    made, sizes = columns([1000]), unknown([1000])
    gradient, made[2][0], made[3][0] = made[1][0], torch.zeros(1000), torch.zeros(1000)
    made[1][0] = torch.zeros(1000)
    path.step(*made, StepSettings(DAMPED, **SETTINGS), sizes=sizes)
    assert float(sizes[0]) == 0
    before = made[0][0].clone()
    made[1][0] = gradient
    path.step(*made, StepSettings(DAMPED, **{**SETTINGS, "weight_decay": 0.0}), sizes=sizes)
    moved = (made[0][0] - before).abs() / (SETTINGS["lr"] * SETTINGS["scale"])
    assert 0.05 < float(moved.median()) < 0.95
