"""The optimizer with bfloat16 state and parameters: resume, layouts, copies, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from reference import Given, curvature_of, noise_like, set_curvature
from sophia import Sophia
from sophia.step.kernels import fused_cpu

BF16 = torch.bfloat16
SHAPES = ((4, 3), (), (7,), (300, 300))


def parameters(dtype=torch.float32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def sophia_of(params, **changed):
    common = {
        "lr": 0.02,
        "betas": (0.9, 0.8),
        "weight_decay": 0.1,
        "update_every": 3,
        "estimator": Given(),
        "state_dtype": BF16,
        "stochastic_rounding": True,
    }
    return Sophia(params, mode="manual", **{**common, **changed})


def train(opt, params, steps, start=0):
    for step in range(start, start + steps):
        if step % 3 == 0:
            set_curvature(opt, curvature_of(params, step))
        for p, g in zip(params, noise_like(params, step), strict=True):
            p.grad = g
        opt.step()


def contents(opt, params):
    return [t for p in params for t in (p.detach(), opt.state[p]["exp_avg"], opt.state[p]["hessian"])]


def same(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_four_bytes_a_parameter():
    """What state_dtype is for; and a parameter of 64 bits keeps its own."""
    params = [*parameters(), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    opt = sophia_of(params)
    train(opt, params, 4)
    for p in params:
        expected = torch.float64 if p.dtype == torch.float64 else BF16
        assert {t.dtype for t in opt.state[p].values()} == {expected}
    small = [t for p in params[:-1] for t in opt.state[p].values()]
    assert sum(t.numel() * t.element_size() for t in small) == 4 * sum(p.numel() for p in params[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_resume_is_bit_equal_at_every_phase(steps, dtype):
    """Noise of a generator that no checkpoint carries, or that counts calls instead of steps."""
    params = parameters(dtype)
    opt = sophia_of(params, seed=4)
    train(opt, params, steps)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = sophia_of(others, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(opt, params, 5, start=steps)
    train(resumed, others, 5, start=steps)
    assert same(contents(opt, params), contents(resumed, others))


def test_seed_step_and_parameter_decide_the_noise():
    """The same roundings in every step, run or parameter would not average out."""

    def m(seed=0, skip=0, before=0):
        p = nn.Parameter(torch.zeros(500))
        fillers = [nn.Parameter(torch.zeros(1)) for _ in range(before)]
        opt = sophia_of([*fillers, p], seed=seed, betas=(0.9, 0.8), lr=0.0)
        opt.param_groups[0]["step"] = skip
        p.grad = torch.full((500,), 1 / 3)
        opt.step()
        return opt.state[p]["exp_avg"].clone()

    assert torch.equal(m(), m())
    for changed in ({"seed": 1}, {"skip": 1}, {"before": 1}):
        assert not torch.equal(m(), m(**changed))
    assert len(m().unique()) == 2


def test_noise_does_not_depend_on_the_groups_or_on_who_has_a_gradient():
    """A frozen or an unused parameter would change the noise of the ones behind it."""
    params, others = parameters(), parameters()
    one = sophia_of(params)
    two = sophia_of([{"params": others[:1]}, {"params": others[1:3]}, {"params": others[3:]}])
    for step in range(3):
        grads = noise_like(params, step)
        for p, q, g in zip(params, others, grads, strict=True):
            p.grad, q.grad = g, g.clone()
        if step == 1:
            params[0].grad = others[0].grad = None
        one.step()
        two.step()
    assert same(contents(one, params), contents(two, others))


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_path_stays_near_float32(path):
    """A refresh, a step or a rounding that is left out on one path.

    Roundings of 2^-8 in m and h move a step of lr by about as much: 12 steps stay within a few per cent of
    the way.
    """
    if path.get("fused") and fused_cpu.unavailable():
        pytest.skip(fused_cpu.unavailable())
    params, wide = parameters(), parameters()
    opt, reference = sophia_of(params, **path), sophia_of(wide, state_dtype=torch.float32, **path)
    train(opt, params, 12)
    train(reference, wide, 12)
    start = parameters()
    for p, q, s in zip(params, wide, start, strict=True):
        assert (p - q).norm() < 0.05 * (q - s).norm()
        for name in ("exp_avg", "hessian"):
            a, b = opt.state[p][name].float(), reference.state[q][name]
            assert (a - b).norm() <= 2.0**-6 * b.norm() + 2.0**-7 * a.numel() ** 0.5


@pytest.mark.parametrize("copy_of", ["deepcopy", "state of float32", "state of bfloat16"])
def test_loading_and_copying_keep_the_setting(copy_of):
    """A file of the other precision is taken in, and the run goes on in its own."""
    params = parameters()
    opt = sophia_of(params, state_dtype=torch.float32 if copy_of == "state of float32" else BF16)
    train(opt, params, 4)
    if copy_of == "deepcopy":
        other = copy.deepcopy(opt)
        others = [p for g in other.param_groups for p in g["params"]]
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = sophia_of(others, state_dtype=torch.float32 if copy_of == "state of bfloat16" else BF16)
        other.load_state_dict(opt.state_dict())
    assert other.stochastic_rounding
    for p, q in zip(params, others, strict=True):
        for name in ("exp_avg", "hessian"):
            torch.testing.assert_close(
                other.state[q][name].float(), opt.state[p][name].float(), rtol=2.0**-8, atol=0
            )
            assert other.state[q][name].dtype == other.state_dtype
    train(other, others, 3, start=4)


def test_stats_are_those_of_the_numbers_that_are_kept():
    """Shares computed in 8 bits: |m| < gamma h is decided by the rounding of gamma h."""
    params, wide = parameters(), parameters()
    opt, reference = sophia_of(params), sophia_of(wide, state_dtype=torch.float32)
    train(opt, params, 4)
    reference.load_state_dict(opt.state_dict())
    assert opt.stats() == reference.stats()


@pytest.mark.parametrize("settings", [{"state_dtype": BF16}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("flag", [{"differentiable": True}, {"capturable": True}], ids=str)
def test_what_a_graph_cannot_hold_is_refused(settings, flag):
    """A captured step repeats the noise of one step: no average. A rounding has no derivative."""
    with pytest.raises(RuntimeError, match=r"stochastic rounding .* goes with neither differentiable"):
        Sophia([nn.Parameter(torch.zeros(3))], mode="manual", **settings, **flag)
    opt = Sophia([nn.Parameter(torch.zeros(3))], mode="manual", **settings)
    with pytest.raises(RuntimeError, match="stochastic rounding"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **flag})
    assert len(opt.param_groups) == 1


def test_float32_state_is_not_touched_by_the_rounding():
    """Rounding that was switched on for bfloat16 parameters must leave the others bit for bit."""
    params, others = parameters(), parameters()
    train(sophia_of(params, state_dtype=torch.float32), params, 5)
    train(sophia_of(others, state_dtype=torch.float32, stochastic_rounding=False), others, 5)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_compiled_step_draws_new_noise_every_step():
    """The key of a step baked into a graph: the same roundings for ever, or a compilation a step."""
    params, others = parameters(), parameters()
    opt, reference = sophia_of(params), sophia_of(others)
    opt.step = torch.compile(opt.step, backend="eager")
    train(opt, params, 6)
    train(reference, others, 6)
    assert same(contents(opt, params), contents(reference, others))


@pytest.mark.parametrize(("rule", "near"), [("damped", 0.15), ("spectral", 0.5)])
def test_the_other_rules_round_too(rule, near):
    """A rule that computes in 8 bits, or ignores the setting. The spectral one moves along all singular
    vectors of m alike, also along those that lie below its rounding: it stays less near.
    """
    runs = []
    for settings in ({}, {"state_dtype": torch.float32}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Linear(40, 5))
        opt = Sophia(model, lr=1e-3, rule=rule, **{"state_dtype": BF16, **settings})
        for step in range(20):
            opt.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
            opt.step()
        runs.append(list(model.parameters()))
        # Second moments of matrices stay wide: they are decomposed.
        kinds = {
            opt.state[p][k].dtype
            for p in model.parameters()
            for k in ("exp_avg", "hessian")
            if k in opt.state[p]
        }
        assert kinds == {settings.get("state_dtype", BF16)}
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Linear(40, 5))
    for p, q, s in zip(*runs, start.parameters(), strict=True):
        assert 0 < (p - q).norm() < near * (q - s).norm()
