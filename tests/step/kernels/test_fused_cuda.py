"""The Triton kernel held to the rule: by Triton's interpreter where triton is installed (``pip install
triton``), and on a GPU where there is one. The interpreter shows arithmetic, masks, types and the table of
addresses; it shows no races, no alignment and no speed.
"""

import importlib
import sys

import numpy as np
import pytest
import torch
from test_foreach import SETTINGS, SHAPES, check, columns, filled

from reference import array, noise_like
from sophia import Sophia, SophiaWarning
from sophia.step.kernels import choose, foreach, fused_cpu, fused_cuda, single_tensor
from sophia.step.rules import PAPER, StepSettings

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel under Triton's interpreter, on CPU tensors."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name = "sophia.step.kernels.triton_step"
    sys.modules.pop(name, None)  # it may have been made for a device
    fused_cuda._kernel.cache_clear()
    importlib.import_module(name)
    monkeypatch.setattr(fused_cuda, "_last", {})
    monkeypatch.setattr(fused_cuda, "_BLOCK", 64)  # several blocks without many numbers
    yield
    sys.modules.pop(name, None)
    fused_cuda._kernel.cache_clear()


SMALL = {
    "vector": SHAPES["vector"][0],
    "0-dim": SHAPES["0-dim"][0],
    "empty": SHAPES["empty"][0],
    "transposed": SHAPES["transposed"][0],
    "permuted": SHAPES["permuted"][0],
    "inside a buffer": SHAPES["inside a buffer"][0],
    "a block, one less, one more": lambda d: [filled((n,), dtype=d) for n in (64, 63, 65)],
    "empty ones between": lambda d: [filled((n,), dtype=d) for n in (0, 5, 0, 0, 200, 0)],
    "many": lambda d: [filled((n % 7, n), dtype=d) for n in range(33)],
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_equals_the_rule(interpreted, make):
    """A tensor that is lost, stepped twice, or read past its end."""
    check(fused_cuda, make, torch.float32, steps=2)


@pytest.mark.parametrize(
    "changed",
    [{"maximize": True}, {"weight_decay": 0.0}, {"gamma": 1e3, "lr": 0.5}, {"eps": 0.5}, {"beta1": 0.0}],
    ids=lambda c: next(iter(c)),
)
def test_settings(interpreted, changed):
    """A setting that the kernel ignores."""
    check(fused_cuda, SMALL["a block, one less, one more"], torch.float32, steps=2, **changed)


def test_tensor_lr(interpreted):
    """A captured step whose lr is baked in would train at one rate for ever."""
    make = SMALL["a block, one less, one more"]
    lr = torch.tensor(0.5)
    check(fused_cuda, make, torch.float32, steps=2, lr=0.5)
    params, ms, hs = columns(make(torch.float32))
    other = [t.clone() for t in params], [t.clone() for t in ms]
    grads = noise_like(params, 0)
    fused_cuda.step(params, grads, ms, hs, StepSettings(PAPER, **{**SETTINGS, "lr": lr}))
    single_tensor.step(other[0], grads, other[1], hs, StepSettings(PAPER, **{**SETTINGS, "lr": 0.5}))
    for a, b in zip(params, other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=6e-7)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(interpreted, dtype, gradient):
    """Arithmetic in half precision, or a grad read as another type. One unit in the last place is allowed:
    the interpreter cuts off where a device rounds.
    """
    params, ms, hs = columns(SMALL["a block, one less, one more"](torch.float32))
    params = [p.to(dtype) for p in params]
    grads = [g.to(gradient) for g in noise_like(ms, 0)]
    other = [t.clone() for t in params], [t.clone() for t in ms]
    fused_cuda.step(params, grads, ms, hs, StepSettings(PAPER, **SETTINGS))
    single_tensor.step(other[0], grads, other[1], hs, StepSettings(PAPER, **SETTINGS))
    for p, q, m, n in zip(params, other[0], ms, other[1], strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(m, n, rtol=2e-6, atol=1e-7)


def test_stochastic_rounding_takes_the_foreach_path():
    """A setting that is ignored on one path: bfloat16 parameters whose small steps are lost."""
    results = []
    for kernel in (fused_cuda, foreach):
        params = [torch.ones(300, dtype=torch.bfloat16)]
        grads, ms, hs = [torch.ones_like(params[0])], [torch.zeros(300)], [torch.zeros(300)]
        settings = StepSettings(PAPER, **{**SETTINGS, "lr": 1e-3}, stochastic=True)
        kernel.step(params, grads, ms, hs, settings, keys=[7])
        results.append(params[0])
    assert torch.equal(*results)
    assert (results[0] != 1).any()


def test_types_may_differ_in_a_list(interpreted):
    """A model with one half-precision layer would be read as garbage."""
    params = [torch.ones(70), torch.ones(70, dtype=torch.bfloat16)]
    grads = [torch.full_like(p, 0.5) for p in params]
    ms, hs = ([torch.zeros(70) for _ in params] for _ in range(2))
    fused_cuda.step(params, grads, ms, hs, StepSettings(PAPER, **{**SETTINGS, "weight_decay": 0.0}))
    for p in params:
        torch.testing.assert_close(p.float(), torch.full((70,), 0.99), rtol=0.01, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_and_stays_in_its_coordinate(interpreted, value):
    """Min and max of a GPU drop a NaN: training would go on with numbers made of nothing."""
    params, ms, hs = columns(SMALL["a block, one less, one more"](torch.float32))
    grads = noise_like(params, 0)
    grads[1][5] = value
    other = [t.clone() for t in params], [t.clone() for t in ms]
    fused_cuda.step(params, grads, ms, hs, StepSettings(PAPER, **SETTINGS))
    single_tensor.step(other[0], grads, other[1], hs, StepSettings(PAPER, **SETTINGS))
    for a, b in zip(params, other[0], strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=2e-6, atol=6e-7)


def test_gradients_and_curvature_are_only_read_and_changes_are_told(interpreted):
    """Autograd must know that the parameters have changed, and nothing else may."""
    params, ms, hs = columns(SMALL["many"](torch.float32))
    grads = noise_like(params, 3)
    before = [(t.clone(), t._version) for t in [*grads, *hs]]
    versions = [t._version for t in [*params, *ms]]
    fused_cuda.step(params, grads, ms, hs, StepSettings(PAPER, **SETTINGS))
    for tensor, (value, version) in zip([*grads, *hs], before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version
    assert all(t._version > v for t, v in zip([*params, *ms], versions, strict=True))


def group(**changed):
    return {"differentiable": False, "foreach": None, "fused": True, "maximize": False, **changed}


def test_what_is_chosen_where(monkeypatch):
    """On CPU tensors never; on a GPU when asked for, where it works and can read lr."""
    cpu = tuple(torch.ones(3) for _ in range(4))
    assert choose(PAPER, group(), 0.1, cpu) is not fused_cuda
    monkeypatch.setattr(fused_cuda, "applies", lambda *row: True)
    monkeypatch.setattr(fused_cuda, "_answers", {torch.device("cpu"): None})
    monkeypatch.setattr(fused_cpu, "applies", lambda *row: False)
    rows = tuple(torch.ones(3) for _ in range(4))
    assert choose(PAPER, group(), 0.1, rows) is fused_cuda
    assert choose(PAPER, group(), torch.tensor(0.1), rows) is fused_cuda
    assert choose(PAPER, group(), torch.ones((), device="meta"), rows) is foreach
    assert choose(PAPER, group(fused=None), 0.1, rows) is foreach
    assert choose(PAPER, group(differentiable=True), 0.1, rows) is single_tensor
    monkeypatch.setattr(fused_cuda, "_answers", {torch.device("cpu"): "broken"})
    assert choose(PAPER, group(), 0.1, rows) is foreach


@pytest.mark.parametrize("broken", ["missing", "raises", "wrong"])
def test_where_it_does_not_work_a_warning_says_why(monkeypatch, broken):
    """A kernel that fails or computes something else on some device must not train."""
    monkeypatch.setattr(fused_cuda, "_answers", {})
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    spec = None if broken == "missing" else object()
    monkeypatch.setattr(fused_cuda.importlib.util, "find_spec", lambda name: spec)

    def step(params, grads, exp_avgs, hessians, settings):
        if broken == "raises":
            raise OSError("no such driver")
        foreach.step(params, grads, exp_avgs, hessians, settings._replace(lr=0.02))

    monkeypatch.setattr(fused_cuda, "step", step)
    said = {"missing": "not installed", "raises": "no such driver", "wrong": "off by"}[broken]
    with pytest.warns(SophiaWarning, match=said):
        assert said in fused_cuda.unavailable(torch.device("cpu"))
    assert said in fused_cuda.unavailable(torch.device("cpu"))  # tried, and said, once


def test_the_tables_are_made_again_only_when_something_moved(interpreted):
    """A table a step would be a copy to the device a step; a stale one would write into freed memory."""
    made = []
    params, ms, hs = columns(SMALL["vector"](torch.float32))
    grads = noise_like(params, 0)
    device = torch.device("cpu")
    for moved in (False, False, True):
        if moved:
            grads = [g.clone() for g in grads]
        addresses = [t.data_ptr() for column in (params, grads, ms, hs) for t in column]
        made.append(fused_cuda._table([*addresses, 7, 0], device))
        assert made[-1].tolist()[: len(addresses)] == addresses


def test_a_table_that_a_graph_has_captured_is_kept(monkeypatch):
    """A replay would read addresses out of memory that the next other table has given back."""
    device, table = torch.device("cpu"), torch.zeros(3)
    monkeypatch.setattr(fused_cuda, "_last", {device: ([1, 2], table)})
    monkeypatch.setattr(fused_cuda, "_captured", [])
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    assert fused_cuda._table([1, 2], device) is table
    assert not fused_cuda._captured
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert fused_cuda._table([1, 2], device) is table
    assert fused_cuda._captured[0][0] is table


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """The interpreter is not a device."""
    torch.manual_seed(0)
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = [torch.randn(n, device="cuda").to(dtype).requires_grad_() for n in (3, 5000, 1024)]
        opt = Sophia(weights, lr=0.01, mode="manual", fused=fused, foreach=False)
        for _ in range(3):
            for w in weights:
                w.grad = torch.ones_like(w) * 1e-3
            opt.step()
        results.append(torch.cat([w.detach().float() for w in weights]))
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@GPU
def test_in_a_cuda_graph():
    """A step that waits for the host, or reads what was true when it was captured."""
    w = torch.ones(2000, device="cuda", requires_grad=True)
    w.grad = torch.full_like(w, 1e-3)
    lr = torch.tensor(0.01, device="cuda")
    opt = Sophia([w], lr=lr, mode="manual", fused=True, capturable=True, weight_decay=0.0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        opt.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    before = w.detach().clone()
    lr.fill_(0.1)
    graph.replay()
    torch.testing.assert_close(before - w.detach(), torch.full_like(before, 0.1))
