"""Half precision: every path in every pair of dtypes, against the rule in float64 and against each other."""

import numpy as np
import pytest
import torch

from reference import array, noise_like, paper_step
from sophia.step.kernels import average_curvature, foreach, fused_cpu, single_tensor
from sophia.step.rounding import key_of_parameter, store
from sophia.step.rules import PAPER, StepSettings

SETTINGS = {"lr": 0.01, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.1, "maximize": False}
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(w, s) for w in (BF16, F16, F32) for s in (F32, BF16, F64)] + [(F64, F64)]
PATHS = [single_tensor, foreach, fused_cpu]
needs_it = pytest.mark.skipif(fused_cpu.unavailable() is not None, reason=str(fused_cpu.unavailable()))


def keys_of(count, step=0):
    return [key_of_parameter(1234 + step * 0x1234567891, i) for i in range(count)]


def columns(dtype, state, shapes=((70_000,), (300, 7), (), (0,), (33,))):
    params = [noise_like([torch.empty(s)], i)[0].to(dtype) for i, s in enumerate(shapes)]
    ms = [m.to(state) for m in noise_like(params, 1, scale=0.1)]
    hs = [(h * h * h * (h.abs() > 0.5)).to(state) for h in noise_like(params, 2, scale=2.0)]
    return params, noise_like(params, 3), ms, hs


def stepped(path, dtype, state, **changed):
    params, grads, ms, hs = columns(dtype, state)
    keys = changed.pop("keys", keys_of(len(params)))
    path.step(params, grads, ms, hs, StepSettings(PAPER, **{**SETTINGS, **changed}), keys=keys)
    return params, ms


def taken(path, dtype, state):
    return path is not fused_cpu or (
        not fused_cpu.unavailable() and (dtype, state, False) in fused_cpu._LOOPS
    )


def exact(dtype, state):
    """The step in float64 from the numbers that are stored, and how far a rounding of m can carry."""
    params, grads, ms, hs = columns(dtype, state)
    numbers = {k: v for k, v in SETTINGS.items() if k != "maximize"}
    for p, g, m, h in zip(params, grads, ms, hs, strict=True):
        theta, mean = paper_step(array(p), array(g), array(m), array(h), **numbers)
        denominator = np.maximum(np.maximum(0.05 * array(h), np.abs(mean)), 1e-12)
        yield theta, mean, 0.01 * 2e-7 / denominator


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("dtype", "state"), PAIRS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__.rpartition(".")[2])
def test_rounded_once_from_the_exact_step(path, dtype, state, stochastic):
    """A path that rounds twice, to the wrong side, or computes in half precision."""
    if not taken(path, dtype, state):
        pytest.skip("this path has no loop for the pair")
    params, ms = stepped(path, dtype, state, stochastic=stochastic)
    for p, m, (theta, mean, slack) in zip(params, ms, exact(dtype, state), strict=True):
        wide = 1e-12 if F64 in (dtype, state) else 5e-7
        for found, expected, kind, chance, more in (
            (p, theta, dtype, stochastic and dtype == BF16, slack if wide > 1e-9 else 0),
            (m, mean, state, state == BF16, 0),
        ):
            # To nearest, half a unit in the last place; by chance, one. eps is the unit at 1.
            unit = torch.finfo(kind).eps * (1.0 if chance else 0.5)
            assert found.dtype == kind
            error = np.abs(array(found) - expected)
            assert (error <= (unit + wide) * np.abs(expected) + wide + more + torch.finfo(kind).tiny).all()


@pytest.mark.parametrize(("dtype", "state"), PAIRS, ids=str)
def test_all_paths_store_the_same(dtype, state):
    """Resuming on a machine without the kernel, or a list that takes another path, is another run.

    The paths may differ in the last place of float32, and where such a pair of numbers lies on two sides of
    a boundary they are rounded apart; the plain path and the kernel average m in one and the same way.
    """
    params, ms = stepped(single_tensor, dtype, state, stochastic=True)
    # Without curvature the step is sign(m): where m came within rounding of zero its sign is anybody's.
    certain = [torch.as_tensor(np.asarray(np.abs(mean) > 1e-6)) for _, mean, _ in exact(dtype, state)]
    for path in (foreach, fused_cpu):
        if not taken(path, dtype, state):
            continue
        others, other_ms = stepped(path, dtype, state, stochastic=True)
        for a, b, sure in zip([*params, *ms], [*others, *other_ms], [*certain, *certain], strict=True):
            if torch.finfo(a.dtype).bits == 16:
                assert int((a != b).sum()) <= max(1, a.numel() // 500)
            torch.testing.assert_close(a[sure], b[sure], rtol=2 * torch.finfo(a.dtype).eps, atol=2e-6)
        if path is fused_cpu:
            assert all(torch.equal(a, b) for a, b in zip(ms, other_ms, strict=True))


@needs_it
@pytest.mark.parametrize(("dtype", "state"), [(F32, BF16), (BF16, BF16), (BF16, F32)], ids=str)
def test_threads_and_blocks_cannot_be_seen(monkeypatch, dtype, state):
    """Noise that is counted from the beginning of a part instead of the tensor."""
    one, other = (
        stepped(fused_cpu, dtype, state, stochastic=True),
        stepped(foreach, dtype, state, stochastic=True),
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(fused_cpu, "_LEAST", 100)
    monkeypatch.setattr(foreach, "_BLOCK", 1000)
    for path, before in ((fused_cpu, one), (foreach, other)):
        for a, b in zip(before, stepped(path, dtype, state, stochastic=True), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_it
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.3337, -1.9, 1e-3, 1e-7, 70_001.0, 1e37])
def test_conversions_of_the_kernel_are_torchs(dtype, decay):
    """All 65536 numbers there are, times a factor that makes them normal, subnormal or infinite.

    With m = 0 the step is a multiplication by ``1 - lr weight_decay``.
    """
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = everything.clone()
    zeros = torch.zeros(2**16)
    settings = {**SETTINGS, "lr": 1.0, "weight_decay": 1 - decay}
    fused_cpu.step(
        [found], [torch.zeros_like(found)], [zeros.clone()], [zeros], StepSettings(PAPER, **settings)
    )
    factor = torch.tensor(1 - (1 - decay)).float()
    expected = (everything.float() * factor).to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__.rpartition(".")[2])
def test_small_steps_of_a_bfloat16_parameter_are_not_lost(path):
    """A weight of 1 with steps of 1e-3, a quarter of the least change to nearest: it would never move.

    4096 weights, 100 steps: the mean move is 0.1 with a standard deviation below 1e-3 (100 roundings of at
    most half of 2^-7 each, over 4096 weights).
    """
    if path is fused_cpu and fused_cpu.unavailable():
        pytest.skip(fused_cpu.unavailable())
    settings = {**SETTINGS, "lr": 1e-3, "weight_decay": 0.0, "beta1": 0.0}
    for stochastic, low, high in ((False, 0.0, 0.0), (True, 0.097, 0.103)):
        p, g = torch.ones(4096, dtype=BF16), torch.ones(4096, dtype=BF16)
        m, h = torch.zeros(4096), torch.zeros(4096)
        for step in range(100):
            given = StepSettings(PAPER, **settings, stochastic=stochastic)
            path.step([p], [g], [m], [h], given, keys=keys_of(1, step))
        assert low <= 1 - float(p.double().mean()) <= high


# ---- the average of h


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("unreached", [False, True])
def test_h_in_bfloat16_is_the_rule_rounded_once(monkeypatch, compiled, unreached):
    """A refresh that forgets, or that counts noise from the wrong element."""
    if not compiled:
        monkeypatch.setattr(fused_cpu, "unavailable", lambda: "not here")
    elif fused_cpu.unavailable():
        pytest.skip(fused_cpu.unavailable())
    h, d = torch.rand(1000, 70).bfloat16(), None if unreached else torch.rand(1000, 70)
    expected = 0.99 * h.float() + 0.01 * (torch.zeros_like(h) if d is None else d)
    stored = torch.empty_like(h)
    store(stored, expected, key_of_parameter(5, 0))
    for shape in ((1000, 70), (70, 1000)):
        for block in (2**20, 999):
            monkeypatch.setattr(average_curvature, "_BLOCK", block)
            monkeypatch.setattr(fused_cpu, "_LEAST", 100 * block)
            found = h.clone().view(shape)
            average_curvature.average(
                found, None if d is None else d.view(shape), beta2=0.99, key=key_of_parameter(5, 0)
            )
            assert int((found.view(h.shape) != stored).sum()) <= 3  # a last place of float32 apart


@pytest.mark.parametrize("layout", ["transposed", "float64", "gaps in h", "transposed h"])
def test_any_estimate_into_any_h(layout):
    """An estimate in another layout paired with the wrong coordinates."""
    values = torch.rand(50, 60)
    h = torch.zeros(50, 60, dtype=BF16)
    d = values
    if layout == "transposed":
        d = values.t().contiguous().t()
    elif layout == "float64":
        d = values.double()
    elif layout == "gaps in h":
        h = torch.zeros(50, 120, dtype=BF16)[:, ::2]
    else:
        h = torch.zeros(60, 50, dtype=BF16).t()
    average_curvature.average(h, d, beta2=0.5, key=3)
    torch.testing.assert_close(h.float(), values / 2, rtol=2.0**-7, atol=1e-30)


@pytest.mark.parametrize("beta", [0.96, 0.99])
def test_an_average_in_bfloat16_averages(beta):
    """To nearest, an average with decay 0.99 stays where it began to stand still; by chance it has the mean
    of what goes in.

    What goes in is h_hat's kind of noise, u^2 with u normal: mean 1, standard deviation sqrt(2). After 600
    steps over 20,000 coordinates the mean has a standard deviation of about 1e-3 (0.1 sqrt(2) / sqrt(20000)).
    """
    generator = torch.Generator().manual_seed(1)
    by_chance, nearest = torch.zeros(20_000, dtype=BF16), torch.zeros(20_000, dtype=BF16)
    exact = torch.zeros(20_000, dtype=F64)
    for step in range(600):
        draw = torch.randn(20_000, generator=generator).square()
        exact = beta * exact + (1 - beta) * draw
        nearest = (beta * nearest.float() + (1 - beta) * draw).bfloat16()
        average_curvature.average(by_chance, draw, beta2=beta, key=keys_of(1, step)[0])
    assert abs(float(by_chance.double().mean() - exact.mean())) < 1e-3
    # A rounding has a variance of gap^2 / 6, of which 1 / (1 - beta^2) are in the average: about 0.017 for
    # beta = 0.99, beside 0.1 of the average itself.
    assert float((by_chance.double() - exact).std()) < 0.22 * float(exact.std())
    if beta == 0.99:
        assert abs(float(nearest.double().mean() - exact.mean())) > 0.02
