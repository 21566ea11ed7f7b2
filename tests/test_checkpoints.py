"""State that other implementations wrote: the factor B, the names, the phase of the refresh, and what is
refused.
"""

import numpy as np
import pytest
import torch
from torch import nn

from reference import SETTINGS, Given, array, noise_like, official_step
from sophia import Sophia
from sophia.checkpoints import from_arrays, from_official

BS, RHO, K = 480.0, 0.04, 5


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ((3, 4), (4,))]


def official(ps, steps, *, lr=1e-3):
    """A run of the official rule from zero; (theta, m, h without B) and its state dict."""
    thetas, ms, hs = ([array(p) for p in ps], *([np.zeros(p.shape) for p in ps] for _ in range(2)))
    for step in range(steps):
        gradients = [array(g) for g in noise_like(ps, step)]
        for i, g in enumerate(gradients):
            thetas[i], ms[i] = official_step(
                thetas[i], g, ms[i], hs[i], lr=lr, beta1=0.96, rho=RHO, bs=BS, weight_decay=0.1
            )
        if step % K == K - 1:  # as in its training script: after the step
            sampled = [array(g) * 0.3 for g in noise_like(ps, 100 + step)]
            hs = [0.99 * h + 0.01 * s * s for h, s in zip(hs, sampled, strict=True)]
    entries = {
        i: {"step": torch.tensor(float(steps)), "exp_avg": torch.tensor(m), "hessian": torch.tensor(h)}
        for i, (m, h) in enumerate(zip(ms, hs, strict=True))
    }
    group = {
        "lr": lr,
        "betas": (0.96, 0.99),
        "rho": RHO,
        "weight_decay": 0.1,
        "maximize": False,
        "capturable": False,
        "params": [0, 1],
    }
    return thetas, ms, hs, {"state": entries, "param_groups": [group]}


@pytest.mark.parametrize("steps", [0, 3, 5, 12])
def test_official_state_goes_on_as_the_official_rule(steps):
    """A factor B that is lost or taken twice: the step would be another one by five orders of magnitude."""
    ps = parameters()
    thetas, ms, hs, saved = official(ps, steps)
    with torch.no_grad():
        for p, theta in zip(ps, thetas, strict=True):
            p.copy_(torch.from_numpy(theta))
    opt = Sophia(ps, mode="manual", estimator=Given(), lr=1.0, gamma=9.0)
    opt.load_state_dict(from_official(saved, bs=BS, update_every=K))
    gradients = noise_like(ps, steps)
    for p, g in zip(ps, gradients, strict=True):
        p.grad = g
    opt.step()
    for p, theta, m, h, g in zip(ps, thetas, ms, hs, gradients, strict=True):
        expected, _ = official_step(
            theta, array(g), m, h, lr=1e-3, beta1=0.96, rho=RHO, bs=BS, weight_decay=0.1
        )
        np.testing.assert_allclose(array(p), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "refreshed", "refreshes"), [(0, -1, 0), (4, -1, 0), (5, 5, 1), (12, 10, 2), (15, 15, 3)]
)
def test_official_phase(steps, refreshed, refreshes):
    """A refresh made twice at the seam, or an h that counts as stale."""
    found = from_official(official(parameters(), steps)[-1], bs=BS, update_every=K)["param_groups"][0]
    assert (found["step"], found["refreshed"], found["refreshes"]) == (steps, refreshed, refreshes)
    assert found["update_every"] == K


def test_official_state_is_not_changed():
    """A checkpoint in memory that is multiplied by B each time it is read."""
    saved = official(parameters(), 7)[-1]
    before = saved["state"][0]["hessian"].clone()
    from_official(saved, bs=BS)
    assert torch.equal(saved["state"][0]["hessian"], before)


def adamw():
    ps = parameters()
    opt = torch.optim.AdamW(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt.state_dict()


def adamw_with_rho():
    state = adamw()
    state["param_groups"][0]["rho"] = 0.04
    return state


def sgd():
    return torch.optim.SGD(parameters(), lr=0.1).state_dict()


def own():
    return Sophia(parameters(), mode="manual").state_dict()


def checkpoint():
    return {"model": {}, "optimizer": official(parameters(), 3)[-1], "iter_num": 3}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (adamw, "an Adam's state, and its second moment is no curvature"),
        (adamw_with_rho, "an Adam's state, and its second moment is no curvature"),
        (sgd, "not the state of the official SophiaG"),
        (own, "this is a state of Sophia already"),
        (checkpoint, r"pass checkpoint\['optimizer'\]"),
    ],
)
def test_other_states_are_refused_with_advice(make, text):
    """A second moment taken for a curvature, or a KeyError."""
    with pytest.raises(ValueError, match=text):
        from_official(make(), bs=BS)


@pytest.mark.parametrize("bs", [0, -1, float("nan"), "480"])
def test_bs_must_be_a_count(bs):
    """An h of zero or NaN."""
    with pytest.raises(ValueError, match="bs="):
        from_official(official(parameters(), 3)[-1], bs=bs)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", ["numpy", "tensors"])
def test_arrays(by_name, kind):
    """Arrays in the order of the model, which is not the order of the groups; or h without its factor."""
    model = small()
    opt = Sophia(model, update_every=10)
    to = (lambda t: t.numpy()) if kind == "numpy" else (lambda t: t)
    m = {n: to(torch.full_like(p, 0.5).detach()) for n, p in model.named_parameters()}
    h = {n: to(torch.full_like(p, i + 1.0).detach()) for i, (n, p) in enumerate(model.named_parameters())}
    names = [n for g in opt.param_groups for n in g["param_names"]]
    given = (m, h) if by_name else ([m[n] for n in names], [h[n] for n in names])
    opt.load_state_dict(from_arrays(opt, *given, step=23, times=2.0))
    for i, (_, p) in enumerate(model.named_parameters()):
        assert torch.equal(opt.state[p]["exp_avg"], torch.full_like(p, 0.5))
        assert torch.equal(opt.state[p]["hessian"], torch.full_like(p, 2.0 * (i + 1)))
    assert [(g["step"], g["refreshed"], g["refreshes"]) for g in opt.param_groups] == [(23, 20, 2)] * 2
    assert opt.param_groups[0]["lr"] == SETTINGS["lr"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: {n: a.T for n, a in m.items()}, r"JAX keeps dense kernels as \(in, out\): transpose it"),
        (lambda m: {n: a[:1] for n, a in m.items()}, "give the same model's state"),
        (lambda m: {f"x.{n}": a for n, a in m.items()}, r"use the names of model.named_parameters\(\)"),
        (lambda m: list(m.values())[:-1], "give one for each, in the order"),
    ],
    ids=["transposed", "shape", "names", "number"],
)
def test_arrays_that_do_not_fit(change, text):
    """Curvature of one coordinate used for another."""
    model = small()
    opt = Sophia(model)
    m = {n: np.zeros(p.shape, dtype=np.float32) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=text):
        from_arrays(opt, change(m), change(m), step=1)


def test_arrays_by_name_need_names():
    """Arrays that are dropped in silence."""
    ps = parameters()
    opt = Sophia(ps, mode="manual")
    with pytest.raises(ValueError, match="does not know its parameters' names"):
        from_arrays(opt, {"a": 1}, {"a": 1}, step=1)


@pytest.mark.parametrize("by_name", [True, False])
def test_frozen_parameters_need_no_arrays(by_name):
    """Sophia holds them, but another implementation has no state for them."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    opt = Sophia(model)
    m, h = torch.ones(2, 3), torch.full((2, 3), 2.0)
    state = from_arrays(opt, {"weight": m} if by_name else [m], {"weight": h} if by_name else [h], step=20)
    opt.load_state_dict(state)
    assert set(opt.state) == {model.weight}
    assert torch.equal(opt.state[model.weight]["hessian"], h)
