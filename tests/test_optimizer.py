"""Sophia as an optimizer: every step from its own state against float64 numpy, what a step leaves alone, and
what it does with gradients that are odd, missing, zero, sparse, complex or not finite.

The replay has its own tests; here h is renewed by hand.
"""

import gc
import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference import Given, Reference, array, curvature_of, give, noise_like, set_curvature
from sophia import Sophia, SophiaWarning
from tiny import GPT, data

# Large rates, so that an error shows; curvature in the range where about half of the steps are clipped.
COMMON = {"lr": 0.02, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.1}
SETTINGS = {**COMMON, "betas": (0.9, 0.8), "update_every": 3}
NUMPY = {**COMMON, "beta1": 0.9, "beta2": 0.8}


def sophia_of(parameters, **changed):
    return Sophia(parameters, mode="manual", estimator=Given(), **{**SETTINGS, **changed})


def parameters_of_all_kinds(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        nn.Parameter(t)
        for t in (
            normal(4, 5),
            normal(),
            normal(0),
            normal(5, 3).t(),
            normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
            normal(70_000),
        )
    ]


def train(opt, parameters, steps, *, start=0, skip=()):
    """Steps with a gradient that depends on the step alone, and a refresh on every third."""
    for step in range(start, start + steps):
        if step % 3 == 0:
            set_curvature(opt, curvature_of(parameters, step))
        give(parameters, noise_like(parameters, step, scale=0.3))
        for index in skip:
            parameters[index].grad = None
        opt.step()


PATHS = {
    "default": {},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
    "tensor lr": {"lr": torch.tensor(0.02, dtype=torch.float64)},
    "1-d tensor lr": {"lr": torch.tensor([0.02], dtype=torch.float64)},
    "2-d tensor lr": {"lr": torch.tensor([[0.02]], dtype=torch.float64)},
    "capturable": {"lr": torch.tensor(0.02, dtype=torch.float64), "capturable": True},
    "capturable for-loop": {
        "lr": torch.tensor(0.02, dtype=torch.float64)[None],
        "capturable": True,
        "foreach": False,
    },
    "float64 state": {"state_dtype": torch.float64},
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_trajectory_equals_numpy(path, maximize):
    """The books around the rule: wrong group, gradient, state or order of refresh and step."""
    params = parameters_of_all_kinds()
    opt, reference = (
        sophia_of(params, maximize=maximize, **path),
        Reference(params, maximize=maximize, **NUMPY),
    )
    for step in range(7):
        if step % 3 == 0:
            set_curvature(opt, curvature_of(params, step))
            reference.refresh(curvature_of(params, step))
        grads = noise_like(params, step, scale=0.3)
        grads[0] = None if step == 4 else grads[0]
        give(params, grads)
        opt.step()
        reference.step(grads)
    for i, p in enumerate(params):
        np.testing.assert_allclose(array(p), reference.thetas[i], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(array(opt.state[p]["exp_avg"]), reference.ms[i], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(array(opt.state[p]["hessian"]), reference.hs[i], rtol=1e-12, atol=1e-15)
    assert 0.2 < opt.stats()["unclipped"] < 0.8  # both regimes were walked through


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_step_from_its_own_state_equals_numpy(dtype):
    """Rounding beyond a few units in the last place, in m, h or theta."""
    params = parameters_of_all_kinds(dtype)
    opt = sophia_of(params)
    for step in range(4):
        set_curvature(opt, curvature_of(params, step))
        assert {t.dtype for p in params for t in opt.state[p].values()} == {torch.float32}
        reference = Reference(params, **NUMPY)
        reference.ms = [array(opt.state[p]["exp_avg"]) for p in params]
        reference.hs = [array(opt.state[p]["hessian"]) for p in params]
        grads = noise_like(params, step, scale=0.3)
        give(params, grads)
        opt.step()
        reference.step(grads)
        for p, theta, m, h in zip(params, reference.thetas, reference.ms, reference.hs, strict=True):
            found_m = array(opt.state[p]["exp_avg"])
            np.testing.assert_allclose(found_m, m, rtol=1e-6, atol=1e-7)
            # A rounding of m moves theta by lr / (gamma h) times as much, or turns the sign of a tiny m.
            denominator = np.maximum(np.maximum(0.05 * h, np.abs(m)), 1e-30)
            ulp = torch.finfo(dtype).eps
            allowed = (1.01 * ulp + 4e-7) * np.abs(theta) + 3e-7 + 0.02 * 1e-7 / denominator
            assert (np.abs(array(p) - theta) <= allowed).all()


def test_equation_of_the_docstring():
    """The class says one formula and does another."""
    step_of_theta = r"(1 - \eta\lambda)\theta - \eta \, \mathrm{clip}(m / \max(\gamma h, \epsilon), 1)"
    assert r"\theta &\leftarrow " + step_of_theta in Sophia.__doc__
    (p,) = params = [nn.Parameter(torch.randn(200, dtype=torch.float64))]
    opt = sophia_of(params)
    eta, (b1, b2), gamma, eps, lam = (SETTINGS[n] for n in ("lr", "betas", "gamma", "eps", "weight_decay"))
    theta, m, h = p.detach().clone(), torch.zeros(200), torch.zeros(200)
    for step in range(7):
        if step % 3 == 0:
            (h_hat,) = curvature_of(params, step)
            set_curvature(opt, [h_hat])
            h = b2 * h + (1 - b2) * h_hat
        (g,) = noise_like(params, step)
        give(params, [g])
        opt.step()
        m = b1 * m + (1 - b1) * g
        theta = (1 - eta * lam) * theta - eta * torch.clip(m / torch.clip(gamma * h, min=eps), -1, 1)
    torch.testing.assert_close(p.detach(), theta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("foreach", [None, False])
def test_maximize_mirrors_bit_for_bit(foreach, dtype):
    """A sign taken at the wrong place: maximizing f is not minimizing -f."""
    a, b = parameters_of_all_kinds(dtype), parameters_of_all_kinds(dtype)
    up, down = sophia_of(a, maximize=True, foreach=foreach), sophia_of(b, foreach=foreach)
    for step in range(5):
        for opt, params in ((up, a), (down, b)):
            if step % 3 == 0:
                set_curvature(opt, curvature_of(params, step))
        grads = noise_like(a, step)
        give(a, grads)
        give(b, [-g for g in grads])
        up.step()
        down.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30]),
    sharpness=st.sampled_from([0.0, 1e-20, 1.0, 1e20, -1.0]),
    lr=st.floats(1e-5, 1.0),
    foreach=st.sampled_from([None, False]),
)
def test_no_coordinate_moves_by_more_than_lr(scale, sharpness, lr, foreach):
    """The promise that holds whatever the gradients and the curvature are."""
    params = [nn.Parameter(torch.randn(30)), nn.Parameter(torch.randn(30, dtype=torch.float64))]
    opt = sophia_of(params, lr=lr, weight_decay=0.0, foreach=foreach)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        opt.estimator.diagonal_of = lambda p: torch.full_like(p, sharpness or 1e-45)
        with opt.hessian_pass():
            pass
        give(params, noise_like(params, step, scale=scale))
        opt.step()
        for p, old in zip(params, before, strict=True):
            assert p.isfinite().all()
            assert float((p.detach() - old).abs().max()) <= lr * (1 + 1e-6) + 1e-6


# ---- what a step leaves alone


@pytest.mark.parametrize("foreach", [None, False])
def test_without_gradients_nothing_moves(foreach):
    """A step after a skipped backward would decay or move the weights."""
    params = parameters_of_all_kinds()
    opt = sophia_of(params, foreach=foreach)
    train(opt, params, 2)
    before = [p.detach().clone() for p in params]
    m = [opt.state[p]["exp_avg"].clone() for p in params]
    opt.zero_grad()
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(torch.equal(opt.state[p]["exp_avg"], b) for p, b in zip(params, m, strict=True))


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_gradients_without_decay_change_no_bit(dtype, foreach):
    """Embeddings of unseen tokens would drift, or become NaN by 0 / 0."""
    params = parameters_of_all_kinds(dtype)
    before = [p.detach().clone() for p in params]
    opt = sophia_of(params, weight_decay=0.0, foreach=foreach)
    for step in range(4):
        if step == 2:
            set_curvature(opt, curvature_of(params, 0))
        give(params, [torch.zeros_like(p) for p in params])
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [None, False])
def test_gradients_are_untouched(foreach, maximize):
    """Gradient logging, clipping and a second optimizer read ``.grad`` after the step."""
    params = parameters_of_all_kinds(torch.float32)
    opt = sophia_of(params, foreach=foreach, maximize=maximize)
    grads = noise_like(params, 0)
    copies, versions = [g.clone() for g in grads], [g._version for g in grads]
    give(params, grads)
    for step in range(3):
        set_curvature(opt, curvature_of(params, step))
        opt.step()
    for p, g, copy, version in zip(params, grads, copies, versions, strict=True):
        assert p.grad is g
        assert torch.equal(g, copy)
        assert g._version == version


def test_frozen_and_unused_parameters_are_left_alone():
    """Fine-tuning: frozen layers would decay, or get state they do not need."""
    frozen, unused, used = (nn.Parameter(torch.randn(3)) for _ in range(3))
    frozen.requires_grad_(False)
    opt = sophia_of([frozen, unused, used])
    before = frozen.clone(), unused.detach().clone()
    for _ in range(3):
        (used * 2).sum().backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(frozen, before[0])
    assert torch.equal(unused, before[1])
    assert set(opt.state) == {used}


def test_zero_grad_is_torchs():
    """Accumulated gradients, or a trainer that relies on ``set_to_none``."""
    p = nn.Parameter(torch.ones(2))
    opt = sophia_of([p])
    p.grad = torch.ones(2)
    opt.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(2))
    opt.zero_grad()
    assert p.grad is None


# ---- state


@pytest.mark.parametrize("foreach", [None, False])
def test_exactly_two_buffers_in_the_layout_of_the_parameter(foreach):
    """Memory beyond AdamW's, or state whose layout forces the slow path (channels_last)."""
    params = parameters_of_all_kinds(torch.float32)
    opt = sophia_of(params, foreach=foreach)
    train(opt, params, 4)
    for p in params:
        assert set(opt.state[p]) == {"exp_avg", "hessian"}
        for buffer in opt.state[p].values():
            assert buffer.shape == p.shape
            assert buffer.stride() == p.stride()
            assert buffer.dtype == torch.float32
            assert not buffer.requires_grad
    assert params[4].is_contiguous(memory_format=torch.channels_last)
    tensors = [t for s in opt.state.values() for t in s.values()]
    assert sum(t.numel() for t in tensors) == 2 * sum(p.numel() for p in params)


def test_state_dtypes():
    """Half-precision h forgets 1e-11; float64 training with float32 state is not float64 training."""
    table = {
        (torch.bfloat16, torch.float32): torch.float32,
        (torch.float16, torch.float32): torch.float32,
        (torch.float32, torch.float32): torch.float32,
        (torch.float64, torch.float32): torch.float64,
        (torch.float32, torch.float64): torch.float64,
        (torch.bfloat16, torch.float64): torch.float64,
    }
    for (dtype, state_dtype), expected in table.items():
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        opt = sophia_of([p], state_dtype=state_dtype)
        set_curvature(opt, [torch.full((3,), 5e-11)])
        p.grad = torch.ones_like(p)
        opt.step()
        assert {t.dtype for t in opt.state[p].values()} == {expected}
        torch.testing.assert_close(opt.state[p]["hessian"], torch.full((3,), 1e-11, dtype=expected))
        assert p.dtype == dtype


def test_mixed_dtypes_and_layouts_equal_one_optimizer_each():
    """Lists cut by dtype: a parameter stepped with the wrong neighbour, or not at all."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    together = [p for dtype in dtypes for p in parameters_of_all_kinds(dtype)]
    together = [together[i] for i in torch.randperm(len(together)).tolist()]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    opt = sophia_of(together)
    train(opt, together, 4)
    opts = [sophia_of([p]) for p in alone]
    for step in range(4):
        curvatures, grads = curvature_of(together, step), noise_like(together, step, scale=0.3)
        for p, one, h, g in zip(alone, opts, curvatures, grads, strict=True):
            if step % 3 == 0 and p.numel():
                set_curvature(one, [h.double() + 1e-30])
            p.grad = g
            one.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-7)


def test_tied_weights_are_stepped_once():
    """Two moves a step for the embedding of every language model with a tied head."""
    model = GPT(tied=True)
    opt = Sophia(model, mode="manual", lr=0.1, weight_decay=0.0)
    assert sum(p is model.tokens.weight for g in opt.param_groups for p in g["params"]) == 1
    before = model.tokens.weight.detach().clone()
    model(*data(4))[1].backward()
    opt.step()
    moved = (model.head.weight.detach() - before).abs()
    torch.testing.assert_close(moved.max(), torch.tensor(0.1), rtol=1e-5, atol=0)


def test_default_dtype_changes_nothing():
    """``torch.set_default_dtype(float64)`` in somebody's notebook."""
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            params = parameters_of_all_kinds(torch.float32)
            opt = sophia_of(params)
            train(opt, params, 5)
            results.append(([p.detach().clone() for p in params], opt.stats()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]


def test_memory_is_flat():
    """A graph, recording or list that grows with the steps ends a run after hours."""
    params = parameters_of_all_kinds(torch.float32)
    opt = sophia_of(params)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    train(opt, params, 20)
    count, size = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(opt, params, 200, start=20)
    assert tensors() <= count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < 8 * 1024  # KiB


# ---- odd gradients


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_gradient_of_another_layout(layout, foreach):
    """Torch's fused AdamW reads such a gradient in storage order: wrong coordinates, no error."""
    grad = {
        "transposed": torch.randn(6, 4).t(),
        "expanded": torch.randn(1, 6).expand(4, 6),
        "strided": torch.randn(8, 12)[::2, ::2],
    }[layout]
    results = []
    for g in (grad, grad.contiguous()):
        p = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
        opt = sophia_of([p], foreach=foreach)
        set_curvature(opt, [torch.linspace(-1, 30, 24).view(4, 6)])
        with torch.no_grad():
            p.grad = g
        opt.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_refused_gradients_move_nothing(kind):
    """Torch raises when it meets the gradient, after the earlier parameters have moved."""
    first = nn.Parameter(torch.ones(2))
    if kind == "sparse":
        table = nn.Embedding(5, 2, sparse=True)
        last, message = table.weight, "does not support sparse gradients .* sparse=False"
        opt = sophia_of([first, last])
        table(torch.tensor([1, 2])).sum().backward()
    else:
        last, message = nn.Parameter(torch.ones(2)), "does not support complex parameters"
        opt = sophia_of([first, last])
        last.data = last.data.to(torch.complex64)  # what the constructor could not see
        last.grad = torch.ones_like(last)
    first.grad = torch.ones(2)
    before = repr(opt.state_dict()), first.detach().clone(), last.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert repr(opt.state_dict()) == before[0]
    assert torch.equal(first, before[1])
    assert torch.equal(last, before[2])


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_gradient_shows_in_its_coordinate_and_nowhere_else(value, foreach):
    """A step that hides the NaN, or spreads it: neither lets a user find the layer that overflowed."""
    params, clean = parameters_of_all_kinds(torch.float32), parameters_of_all_kinds(torch.float32)
    for ps, bad in ((params, True), (clean, False)):
        opt = sophia_of(ps, foreach=foreach)
        give(ps, noise_like(ps, 0))
        if bad:
            ps[0].grad[1, 2] = value
        opt.step()
    assert not opt.state[clean[0]]["exp_avg"].isnan().any()
    if value != value or foreach is None:
        assert params[0][1, 2].isnan()
    with torch.no_grad():
        params[0][1, 2] = clean[0][1, 2]
    assert all(torch.equal(a, b) for a, b in zip(params, clean, strict=True))


def test_grad_scaler_on_the_cpu():
    """A loss scale that reaches m, or an overflow that moves something."""
    results = []
    for scaled in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 8))
        opt = sophia_of([p])
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10, growth_interval=1000)
        for step in range(4):
            scaler.scale((p * torch.linspace(1, 2, 8) * (step + 1)).sum()).backward()
            if scaled and step == 2:
                before, books = p.detach().clone(), repr(opt.state_dict())
                p.grad[0] = float("inf")
            if scaled or step != 2:
                scaler.step(opt)
                scaler.update()
            if scaled and step == 2:
                assert torch.equal(p, before)
                assert repr(opt.state_dict()) == books
            opt.zero_grad()
        results.append((p.detach().clone(), opt.state[p]["exp_avg"].clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---- the clock of the curvature


def test_manual_mode_says_when_h_is_forgotten():
    """A loop that never calls the Hessian pass trains sign momentum under the name of Sophia, silently."""
    p = nn.Parameter(torch.ones(2))
    opt = sophia_of([p], update_every=2)

    def step():
        p.grad = torch.ones(2)
        opt.step()

    for _ in range(5):
        step()
    with pytest.warns(SophiaWarning, match=r"never refreshed in 5 steps \(update_every=2\).*hessian_pass"):
        step()
    step()  # said once
    set_curvature(opt, [torch.ones(2)])
    for _ in range(5):
        step()
    with pytest.warns(SophiaWarning, match=r"last refreshed 5 steps ago \(update_every=2\)"):
        step()


def test_stale_warning_as_an_error_leaves_a_whole_step():
    """Where warnings are errors, half of the groups would have moved."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = sophia_of([{"params": [a], "update_every": 100}, {"params": [b]}], update_every=1)
    for _ in range(3):
        a.grad, b.grad = torch.ones(2), torch.ones(2)
        opt.step()
    before = a.detach().clone(), repr(opt.state_dict())
    with pytest.raises(SophiaWarning):  # warnings are errors in this test run
        opt.step()
    assert torch.equal(a, before[0])
    assert repr(opt.state_dict()) == before[1]


def test_stats_are_numbers_with_stable_names():
    """Dashboards and the advice read these keys."""
    params = parameters_of_all_kinds(torch.float32)
    opt = sophia_of(params)
    names = {"unclipped", "eps_limited", "h_zero", "h_q05", "h_q50", "h_q95"}
    names |= {"own_rule", "has_curvature", "B", "share", "gradient_scale", "age", "refreshes", "skipped"}
    assert set(opt.stats()) == names  # before the first step too
    train(opt, params, 5)
    stats = opt.stats()
    assert set(stats) == names
    assert all(type(value) is float for value in stats.values())
    assert (stats["age"], stats["refreshes"], stats["skipped"], stats["B"]) == (2.0, 2.0, 0.0, 1.0)
    m = np.concatenate([array(opt.state[p]["exp_avg"]).ravel() for p in params])
    h = np.concatenate([array(opt.state[p]["hessian"]).ravel() for p in params])
    assert stats["unclipped"] == pytest.approx(np.mean(np.abs(m) < 0.05 * h), abs=1e-4)
    assert stats["eps_limited"] == pytest.approx(np.mean(0.05 * h <= 1e-12), abs=1e-4)
    assert stats["h_zero"] == pytest.approx(np.mean(h == 0), abs=1e-9)
    assert stats["h_q95"] == pytest.approx(np.quantile(h, 0.95), rel=1e-3)


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read as a number, for which the host waits."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_corrections_that_a_graph_would_freeze_are_refused():
    """A captured step of the damped rule would correct for the start at zero for ever, without a word."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "scale": 1.0}]
    with pytest.raises(RuntimeError, match=r"rule='damped': .*a captured graph would repeat"):
        Sophia(groups, lr=0.1, mode="manual", rule="damped", capturable=True)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("rule", ["paper", "spectral"])
def test_a_step_with_a_tensor_lr_reads_no_number(rule, foreach):
    """A CUDA graph cannot be captured around a read: ``capturable=True`` would be an error on a GPU."""
    weight = nn.Parameter(torch.ones(4, 5))
    weight.grad = torch.full_like(weight, 1e-3)
    group = {"params": [weight], "rule": rule, **({} if rule == "paper" else {"scale": 0.2})}
    opt = Sophia([group], lr=torch.tensor(0.1), mode="manual", capturable=True, foreach=foreach)
    opt.step()
    with Reads() as reads:
        opt.step()
    assert reads.count == 0
