"""Every path against the plain rule in float64 numpy, over shapes, layouts and dtypes; and the foreach path's
own business: what it takes, and that its blocks cannot be seen in the result.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reference import Reference, array, noise_like
from sophia.step.flat_views import is_dense
from sophia.step.kernels import foreach, fused_cpu, single_tensor
from sophia.step.rules import PAPER, StepSettings

BLOCK = foreach._BLOCK

SETTINGS = {"lr": 0.01, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.1}
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}, torch.float32: {"rtol": 2e-6, "atol": 6e-7}}


def filled(shape, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# name -> (make the tensors, whether the foreach path takes them)
SHAPES = {
    "vector": (lambda d: [filled((7,), dtype=d)], True),
    "0-dim": (lambda d: [filled((), dtype=d)], True),
    "empty": (lambda d: [filled((0,), dtype=d), filled((0, 3), dtype=d)], True),
    "one element, four dimensions": (lambda d: [filled((1, 1, 1, 1), dtype=d)], True),
    "transposed": (lambda d: [filled((5, 3), dtype=d).t()], True),
    "permuted": (lambda d: [filled((2, 3, 4), dtype=d).permute(2, 0, 1)], True),
    "channels_last": (lambda d: [filled((2, 3, 4, 5), dtype=d).to(memory_format=torch.channels_last)], True),
    "inside a buffer": (lambda d: [filled((100,), dtype=d)[13:63].view(5, 10)], True),
    "every other element": (lambda d: [filled((20,), dtype=d)[::2]], False),
    "some columns": (lambda d: [filled((6, 8), dtype=d)[:, 2:5]], False),
    "exactly a block": (lambda d: [filled((BLOCK,), dtype=d)], True),
    "one more than a block": (lambda d: [filled((BLOCK + 1,), dtype=d)], True),
    "several blocks": (lambda d: [filled((3, BLOCK - 5), dtype=d)], True),
    "transposed and several blocks": (lambda d: [filled((700, 300), dtype=d).t()], True),
    "many small ones": (lambda d: [filled((n % 7, n), dtype=d) for n in range(60)], None),
    "small and large": (lambda d: [filled(s, dtype=d) for s in ((3,), (BLOCK + 9,), (), (40, 50))], True),
}


def columns(tensors):
    """Parameters, m and h in the layout of each parameter; h of every kind: sharp, flat, zero, negative."""
    ms = noise_like(tensors, 1, scale=0.1)
    hs = [h * h * h for h in noise_like(tensors, 2, scale=2.0)]
    for h in hs:
        h[h.abs() < 0.5] = 0
    return tensors, ms, hs


def run(kernel, tensors, *, steps=5, gradient=noise_like, **changed):
    """Step copies of the tensors; return them and their m."""
    params = [torch.empty_like(t).copy_(t) if is_dense(t) else t for t in tensors]
    params, ms, hs = columns(params)
    for step in range(steps):
        with torch.no_grad():
            kernel.step(
                params, gradient(params, step), ms, hs, StepSettings(PAPER, **{**SETTINGS, **changed})
            )
    return params, ms


def expected(tensors, *, steps=5, gradient=noise_like, maximize=False, **changed):
    params, ms, hs = columns(tensors)
    reference = Reference(params, maximize=maximize, **{**SETTINGS, **changed})
    reference.ms, reference.hs = [array(m) for m in ms], [array(h) for h in hs]
    for step in range(steps):
        reference.step(gradient(params, step))
    return reference


def check(kernel, make, dtype, **changed):
    reference = expected(make(dtype), **changed)
    params, ms = run(kernel, make(dtype), **changed)
    for p, m, theta, mean, smallest in zip(
        params, ms, reference.thetas, reference.ms, reference.smallest, strict=True
    ):
        # Without curvature the step is sign(m): where m came within rounding of zero its sign is anybody's.
        certain = (smallest > 1e-6) | (smallest == 0) if dtype == torch.float32 else np.ones_like(theta, bool)
        assert certain.size - certain.sum() <= 1e-3 * certain.size
        np.testing.assert_allclose(array(p)[certain], theta[certain], **TOLERANCE[dtype])
        np.testing.assert_allclose(array(m), mean, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("make", "taken"), SHAPES.values(), ids=SHAPES)
def test_every_path_equals_the_rule(make, taken, dtype):
    """A path that pairs the wrong coordinates, drops a block, or computes another formula."""
    check(single_tensor, make, dtype)
    if taken is not False:
        check(foreach, make, dtype)
        if not fused_cpu.unavailable():
            check(fused_cpu, make, dtype)


@pytest.mark.parametrize(
    "changed",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"lr": 0.5, "gamma": 1e3},
        {"gamma": 1e-9},
        {"eps": 0.5},
        {"beta1": 0.0},
        {"gradient": lambda params, step: [torch.zeros_like(p) for p in params]},
        {"gradient": lambda params, step: noise_like(params, step, scale=1e-20)},
    ],
    ids=lambda c: ", ".join(c) + str(next(iter(c.values())))[:6],
)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (foreach, torch.float64),
        (foreach, torch.float32),
        (single_tensor, torch.float64),
        (single_tensor, torch.float32),
        (fused_cpu, torch.float64),
        (fused_cpu, torch.float32),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)).rpartition(".")[2],
)
def test_settings(kernel, dtype, changed):
    """A setting that one path ignores, or an edge of one (no decay, no step, no average)."""
    if kernel is fused_cpu and fused_cpu.unavailable():
        pytest.skip(fused_cpu.unavailable())
    check(kernel, SHAPES["small and large"][0], dtype, **changed)


@pytest.mark.parametrize("kernel", [foreach, single_tensor], ids=["foreach", "single_tensor"])
def test_tensor_lr(kernel):
    """Compiled and captured steps, which keep lr in a tensor, would train at another rate."""
    make = SHAPES["small and large"][0]
    number, _ = run(kernel, make(torch.float64))
    tensor, _ = run(kernel, make(torch.float64), lr=torch.tensor(SETTINGS["lr"], dtype=torch.float64))
    for a, b in zip(number, tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("lr_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_coarse_tensor_lr_still_decays(dtype, lr_dtype):
    """1 - lr * weight_decay is 1 in half precision: weights that are never decayed, and no error."""
    lr = torch.tensor(2.0**-10, dtype=lr_dtype)
    params = [torch.ones(3, dtype=dtype)]
    zeros = [torch.zeros_like(params[0])]
    settings = {**SETTINGS, "lr": lr, "weight_decay": 0.25}
    foreach.step(params, zeros, [zeros[0].clone()], zeros, StepSettings(PAPER, **settings))
    torch.testing.assert_close(params[0], torch.full((3,), 1 - 2.0**-12, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_cannot_be_seen(monkeypatch, dtype):
    """Results that depend on where memory is cut would depend on the machine the constant was tuned on."""
    make = SHAPES["small and large"][0]
    whole, m_whole = run(foreach, make(dtype))
    for size in (1000, 4097, 2**30):
        monkeypatch.setattr(foreach, "_BLOCK", size)
        params, ms = run(foreach, make(dtype))
        for a, b in zip([*whole, *m_whole], [*params, *ms], strict=True):
            # Vectorised and remainder loops may round a last bit differently, and nothing more.
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    block=st.integers(1, 50),
    seed=st.integers(0, 99),
    maximize=st.booleans(),
)
def test_any_list_in_any_blocks(sizes, block, seed, maximize):
    """A tensor that is lost, stepped twice or paired with another's gradient for some mixture of sizes."""
    params = [filled((n,)) + seed for n in sizes]
    reference = expected([p.clone() for p in params], maximize=maximize)
    before = foreach._BLOCK
    foreach._BLOCK = block
    try:
        params, _ = run(foreach, params, maximize=maximize)
    finally:
        foreach._BLOCK = before
    for p, theta in zip(params, reference.thetas, strict=True):
        np.testing.assert_allclose(array(p), theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", [foreach, single_tensor], ids=["foreach", "single_tensor"])
def test_gradients_and_curvature_are_only_read(kernel):
    """Clipping, logging or a second optimizer after the step would see changed gradients."""
    params, ms, hs = columns(SHAPES["small and large"][0](torch.float32))
    grads = noise_like(params, 3)
    watched = [*grads, *hs]
    before = [(t.clone(), t._version) for t in watched]
    for maximize in (False, True):
        kernel.step(params, grads, ms, hs, StepSettings(PAPER, **SETTINGS, maximize=maximize))
    for tensor, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@pytest.mark.parametrize("kernel", [foreach, single_tensor], ids=["foreach", "single_tensor"])
def test_neighbours_in_a_buffer_are_left_alone(kernel):
    """Flat parameters (FSDP, fused buffers): walking memory past a view would corrupt the next parameter."""
    buffer = torch.full((100,), 7.0)
    view = buffer[20:80].view(6, 10).t()
    params, ms, hs = columns([view])
    kernel.step(params, noise_like(params, 0), ms, hs, StepSettings(PAPER, **SETTINGS))
    assert torch.equal(buffer[:20], torch.full((20,), 7.0))
    assert torch.equal(buffer[80:], torch.full((20,), 7.0))
    assert (view != 7).all()


class Wrapped(torch.Tensor):
    """Any tensor subclass: a sharded or quantised one has another memory than its shape says."""


def four(tensor):
    return [tensor, *(torch.empty_like(tensor).fill_(1.0) for _ in range(3))]


APPLIES = {
    "dense float32": (lambda: four(torch.ones(3, 4)), True),
    "dense float64": (lambda: four(torch.ones(3, 4, dtype=torch.float64)), True),
    "parameter": (lambda: four(nn.Parameter(torch.ones(3, 4))), True),
    "transposed alike": (lambda: four(torch.ones(3, 4).t()), True),
    "channels_last alike": (
        lambda: four(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        True,
    ),
    "gradient transposed": (lambda: [torch.ones(3, 3), torch.ones(3, 3).t(), *[torch.ones(3, 3)] * 2], False),
    "state in float32, parameter in bfloat16": (
        lambda: [torch.ones(3, dtype=torch.bfloat16)] * 2 + [torch.ones(3)] * 2,
        True,
    ),
    "all bfloat16": (lambda: four(torch.ones(3, dtype=torch.bfloat16)), True),
    "state in float64": (lambda: [torch.ones(3)] * 2 + [torch.ones(3, dtype=torch.float64)] * 2, True),
    "state in float16": (lambda: [torch.ones(3)] * 2 + [torch.ones(3, dtype=torch.float16)] * 2, False),
    "m in bfloat16, h in float32": (
        lambda: [torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.ones(3)],
        False,
    ),
    "gradient in float32, parameter in bfloat16": (
        lambda: [torch.ones(3, dtype=torch.bfloat16), *[torch.ones(3)] * 3],
        False,
    ),
    "gaps": (lambda: [torch.ones(6)[::2]] * 4, False),
    "overlaps": (lambda: [torch.ones(1).expand(3)] * 4, False),
    "subclass": (lambda: four(torch.ones(3).as_subclass(Wrapped)), False),
    "other device": (lambda: [torch.ones(3), *[torch.ones(3, device="meta")] * 3], False),
}  # fmt: skip


@pytest.mark.parametrize(("make", "answer"), APPLIES.values(), ids=APPLIES)
def test_what_the_path_takes(make, answer):
    """Taking too much pairs wrong coordinates silently; taking too little makes the default slow."""
    assert foreach.applies(*make()) is answer


def test_empty_list():
    """A group whose parameters all lack a gradient."""
    foreach.step([], [], [], [], StepSettings(PAPER, **SETTINGS))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", [foreach, single_tensor], ids=["foreach", "single_tensor"])
def test_a_bad_gradient_stays_in_its_coordinate(kernel, value):
    """Documented: NaN gives NaN; inf gives NaN or a step of lr; no neighbour, tensor or block is touched."""
    tensors = SHAPES["small and large"][0](torch.float32)

    def poisoned(params, step):
        grads = noise_like(params, step)
        grads[1][5] = value
        return grads

    clean, _ = run(kernel, [t.clone() for t in tensors], steps=2)
    params, ms = run(kernel, [t.clone() for t in tensors], steps=2, gradient=poisoned)
    assert not ms[1][5].isfinite()
    moved = params[1][5]
    if value != value or kernel is foreach:
        assert moved.isnan()
    else:
        start = tensors[1][5]
        decayed = start * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"])
        assert abs(moved - decayed) < 2.1 * SETTINGS["lr"]
    params[1][5] = clean[1][5]
    for a, b in zip(params, clean, strict=True):
        assert torch.equal(a, b)
