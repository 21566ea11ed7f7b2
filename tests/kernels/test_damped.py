"""The damped rule compiled and in blocks, against numpy in float64: small tensors, tensors cut into pieces,
tensors whose rms is sampled.
"""

import math

import numpy as np
import pytest
import torch

from sophia.kernels import fused_cpu, variants
from sophia.update_rule import EVERY, LINE, SAMPLED_ABOVE, rms

needs_it = pytest.mark.skipif(fused_cpu.unavailable() is not None, reason=str(fused_cpu.unavailable()))

SETTINGS = {
    "lr": 0.01,
    "beta1": 0.9,
    "gamma": 0.3,
    "eps": 1e-12,
    "weight_decay": 0.1,
    "maximize": False,
    "rule": "damped",
    "damping": 0.5,
    "scale": 0.4,
}
SIZES = [0, 1, 31, 33, 5_000, 2**17, 2**17 + 5, 400_001, SAMPLED_ABOVE, SAMPLED_ABOVE + 1, 2_500_013]
STATES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


def columns(sizes, dtype=torch.float32, kept=torch.float32):
    """Rows of very different sizes, as an embedding has: a sample of a few places would be far off."""
    g = torch.Generator().manual_seed(0)
    scales = [torch.randn(n, generator=g).exp() for n in sizes]
    rows = [[torch.randn(n, generator=g) * s for n, s in zip(sizes, scales, strict=True)] for _ in range(4)]
    types = (dtype, dtype, kept, kept)
    made = [[t.to(kind) for t in row] for row, kind in zip(rows, types, strict=True)]
    made[3] = [h.abs() for h in made[3]]
    return made


def numpy_step(p, g, m, h, *, maximize=False):
    """Textbook arithmetic on arrays in float64; the sample taken by index."""
    b, s = 0.9, SETTINGS
    g = -g if maximize else g
    m = b * m + (1 - b) * g
    u = b * m + (1 - b) * g
    seen = u
    if u.size > 2**19:
        seen = u[[16 * run + place for run in range(0, u.size // 16, 67) for place in range(16)]]
    floor = max(s["damping"] * math.sqrt((seen**2).mean()), s["eps"]) if u.size else s["eps"]
    direction = np.clip(u / np.maximum(s["gamma"] * h, floor), -1, 1)
    return (1 - s["lr"] * s["weight_decay"]) * p - s["lr"] * s["scale"] * direction, m


def test_the_sample_is_what_the_docs_say():
    assert (SAMPLED_ABOVE, LINE, EVERY) == (2**19, 16, 67)
    u = torch.zeros(2**19 + 16)
    u[:16] = 1.0  # of 32,769 runs, 490 are looked at
    assert float(rms(u)) == pytest.approx(math.sqrt(1 / 490))
    assert float(rms(u[: 2**19])) == pytest.approx(math.sqrt(2**-15))


@needs_it
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "kept"), STATES)
def test_equals_the_rule(dtype, kept, maximize):
    """A floor of another tensor, a piece left out or counted twice, u without the look ahead."""
    made = columns(SIZES, dtype, kept)
    expected = [
        numpy_step(*(t.double().numpy() for t in row), maximize=maximize) for row in zip(*made, strict=True)
    ]
    noise = {"keys": list(range(len(SIZES)))} if kept == torch.bfloat16 else {}
    fused_cpu.step(*made, **{**SETTINGS, "maximize": maximize}, **noise)
    near = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for p, m, (theta, momentum) in zip(made[0], made[2], expected, strict=True):
        np.testing.assert_allclose(p.double().numpy(), theta, rtol=near[dtype], atol=near[dtype] / 4)
        np.testing.assert_allclose(m.double().numpy(), momentum, rtol=near[kept], atol=near[kept] / 4)


@pytest.mark.parametrize("in_blocks", [True, False])
def test_the_paths_without_it_equal_the_rule(in_blocks):
    """Blocks of another sample; a run that goes on elsewhere, where no compiler was found, as another run."""
    made = columns(SIZES)
    expected = [numpy_step(*(t.double().numpy() for t in row)) for row in zip(*made, strict=True)]
    # A tensor lr takes the path that writes the rule down.
    variants.step(*made, **{**SETTINGS, "lr": 0.01 if in_blocks else torch.tensor(0.01)})
    for p, m, (theta, momentum) in zip(made[0], made[2], expected, strict=True):
        np.testing.assert_allclose(p.double().numpy(), theta, rtol=2e-6, atol=5e-7)
        np.testing.assert_allclose(m.double().numpy(), momentum, rtol=2e-6, atol=5e-7)


@needs_it
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_cannot_be_seen(threads):
    """A sum whose order depends on who adds; a small tensor on the cut that both walk through, or neither."""

    def stepped(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            made = columns([40_000, 1, 90_003, 17, 65_536, 3, 300_000, 2_500_013, 100_000])
            fused_cpu.step(*made, **SETTINGS)
            return [*made[0], *made[2]]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(stepped(1), stepped(threads), strict=True))


@needs_it
def test_what_is_no_number_stays_none():
    """A floor that hides a NaN gradient would let the rest of the tensor go on with steps of full size."""
    for size in (10, 200_000):
        made = columns([size])
        made[1][0][3] = float("nan")
        fused_cpu.step(*made, **SETTINGS)
        assert made[0][0].isnan().all()
