"""How torch's own tools meet the optimizer: closures, hooks, schedulers, clipping, averaging, derivatives."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from reference import Given, noise_like, set_curvature
from sophia import Sophia


def parameter(*values):
    return nn.Parameter(torch.tensor(values or (1.0, -2.0, 3.0)))


def sophia_of(params, **changed):
    common = {"lr": 0.1, "betas": (0.5, 0.0), "weight_decay": 0.0, "update_every": 1000, "estimator": Given()}
    return Sophia(params, mode="manual", **{**common, **changed})


# ---- closures


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_closure(outer):
    """Lightning and L-BFGS-style loops pass one: once, with gradients on, and the loss comes back."""
    p, calls = parameter(), []
    opt = sophia_of([p])

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with outer():
        loss = opt.step(closure)
    assert calls == [True]
    assert loss.item() == 14.0
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, -1.9, 2.9]))  # no h yet: sign steps
    assert opt.step() is None
    assert opt.step(closure=lambda: 7) == 7


def test_closure_that_raises_moves_nothing():
    """An interrupted evaluation followed by a step on stale gradients."""
    p = parameter()
    opt = sophia_of([p])
    p.grad = torch.ones(3)
    before = p.detach().clone()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert torch.equal(p, before)
    assert opt.param_groups[0]["step"] == 0


def test_step_leaves_the_grad_mode_alone():
    """Code after the step that silently builds no graph."""
    p = parameter()
    opt = sophia_of([p])
    p.grad = torch.ones(3)
    opt.step()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        opt.step()
        assert not torch.is_grad_enabled()
    assert p.requires_grad
    assert p.is_leaf


# ---- hooks


def test_step_hooks_global_and_own_in_torchs_order():
    """Profilers, EMA and FSDP register them; they also fire in copies of the optimizer."""
    p, order = parameter(), []
    opt = sophia_of([p])
    p.grad = torch.ones(3)
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: order.append("global pre")),
        register_optimizer_step_post_hook(lambda o, a, k: order.append("global post")),
    ]
    opt.register_step_pre_hook(lambda o, a, k: order.append(("pre", o is opt, float(p[0].detach()))))
    opt.register_step_post_hook(lambda o, a, k: order.append(("post", o is opt, float(p[0].detach()))))
    try:
        opt.step()
    finally:
        for handle in handles:
            handle.remove()
    assert order == [
        "global pre",
        ("pre", True, 1.0),
        ("post", True, pytest.approx(0.9)),
        "global post",
    ]


def test_step_shows_up_in_the_profiler():
    """Traces label optimizer steps by this name."""
    p = parameter()
    opt = sophia_of([p])
    p.grad = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#Sophia.step" in {event.key for event in profile.key_averages()}


def test_repr_lists_the_settings():
    """The first thing a user prints."""
    assert "Sophia" in repr(sophia_of([parameter()]))
    assert "gamma: 0.05" in repr(sophia_of([parameter()]))


# ---- schedulers

SCHEDULERS = {
    "LambdaLR from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "OneCycleLR without momentum": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=8, cycle_momentum=False
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 4)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_what_the_next_step_uses(name, tensor_lr):
    """Each step is a sign step here, so the move is the rate; a cached rate or a broken warm-up shows."""
    p = parameter()
    opt = sophia_of([p], lr=torch.tensor(0.1) if tensor_lr else 0.1)
    scheduler = SCHEDULERS[name](opt)
    rates = set()
    for step in range(8):
        lr, beta1 = float(opt.param_groups[0]["lr"]), opt.param_groups[0]["betas"][0]
        before, m = p.detach().clone(), opt.state[p].get("exp_avg", torch.zeros(3)).clone()
        (p.grad,) = noise_like([p], step)
        opt.step()
        moved = before - p.detach()
        m = beta1 * m + (1 - beta1) * p.grad
        torch.testing.assert_close(opt.state[p]["exp_avg"], m)
        torch.testing.assert_close(moved, lr * torch.sign(m), rtol=1e-4, atol=1e-6)
        rates.add(round(lr, 6))
        if step < 7:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(rates) > 2


def test_one_cycle_cycles_beta1_and_leaves_beta2():
    """OneCycleLR writes into ``betas``: the decay of h must survive, and beta1 must be what it says."""
    p = parameter()
    opt = sophia_of([p], betas=(0.96, 0.99))
    scheduler = lr_scheduler.OneCycleLR(
        opt, max_lr=0.1, total_steps=4, base_momentum=0.85, max_momentum=0.95, pct_start=0.5
    )
    assert opt.param_groups[0]["betas"] == (0.95, 0.99)
    p.grad = torch.ones(3)
    opt.step()
    scheduler.step()
    assert opt.param_groups[0]["betas"] == (pytest.approx(0.85), 0.99)


def test_first_rate_of_zero_moves_nothing_but_the_averages():
    """Every warm-up starts there: a division by lr, or a step of 0 / 0, would end it at once."""
    p = parameter()
    opt = sophia_of([p], weight_decay=0.5, lr=0.0)
    before = p.detach().clone()
    set_curvature(opt, [torch.ones(3)])
    p.grad = torch.tensor([1.0, 0.0, -1.0])
    opt.step()
    assert torch.equal(p, before)
    torch.testing.assert_close(opt.state[p]["exp_avg"], p.grad / 2)


def test_scheduler_and_optimizer_resume_together():
    """The order that torch documents: build both, load both, continue."""

    def build():
        p = parameter()
        opt = sophia_of([p])
        return p, opt, lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)

    def run(p, opt, scheduler, steps):
        for step in steps:
            (p.grad,) = noise_like([p], step)
            opt.step()
            scheduler.step()

    p, opt, scheduler = build()
    run(p, opt, scheduler, range(4))
    q, other, other_scheduler = build()
    with torch.no_grad():
        q.copy_(p)
    other_scheduler.load_state_dict(scheduler.state_dict())
    other.load_state_dict(opt.state_dict())
    run(p, opt, scheduler, range(4, 8))
    run(q, other, other_scheduler, range(4, 8))
    assert torch.equal(p, q)


# ---- other tools


def test_clip_grad_norm_before_the_step():
    """What every recipe does between backward and step."""
    p = parameter()
    opt = sophia_of([p])
    p.grad = torch.tensor([300.0, 0.0, -400.0])
    nn.utils.clip_grad_norm_([p], 1.0)
    opt.step()
    torch.testing.assert_close(opt.state[p]["exp_avg"], torch.tensor([0.3, 0.0, -0.4]), rtol=1e-4, atol=0)


def test_weight_averaging():
    """SWA and EMA copy the model, and SWALR drives the rate."""
    model = nn.Linear(3, 1)
    averaged = swa_utils.AveragedModel(model)
    opt = sophia_of(model.parameters())
    scheduler = swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=2)
    weights = []
    for step in range(3):
        for p, g in zip(model.parameters(), noise_like(list(model.parameters()), step), strict=True):
            p.grad = g
        opt.step()
        averaged.update_parameters(model)
        weights.append(model.weight.detach().clone())
        scheduler.step()
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(weights).mean(0))
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)


def test_parameter_data_replaced_between_steps():
    """Loading weights into the model after building the optimizer must keep both connected."""
    model = nn.Linear(3, 2)
    opt = sophia_of(model.parameters())
    model.load_state_dict({"weight": torch.full((2, 3), 5.0), "bias": torch.zeros(2)})
    model.weight.grad = torch.ones(2, 3)
    opt.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), 4.9))


# ---- derivatives


def test_differentiable_steps_give_the_gradient_of_the_whole_run():
    """Learning the learning rate, or the start: checked against finite differences in float64."""
    start = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor([40.0, 30.0, 25.0], dtype=torch.float64)  # unclipped: clips have no derivative

    def run(start, lr):
        theta = start.clone()
        opt = sophia_of([theta], lr=lr, weight_decay=0.1, differentiable=True)
        theta.grad = torch.zeros(3, dtype=torch.float64)  # torch warns of an empty .grad that is no leaf's
        set_curvature(opt, [curvature])
        for _ in range(3):
            now = theta.clone()  # the step writes into theta, which a graph through it would need unchanged
            theta.grad = now * 0.9 + 0.1 * now**2
            opt.step()
        return (theta**2).sum()

    assert torch.autograd.gradcheck(run, (start, lr))


def test_differentiable_equals_ordinary():
    """The same numbers, with a graph."""
    results = []
    for differentiable in (False, True):
        leaf = nn.Parameter(torch.linspace(-1, 1, 6))
        theta = leaf.clone() if differentiable else leaf
        opt = sophia_of([theta], differentiable=differentiable, foreach=False, weight_decay=0.1)
        theta.grad = torch.zeros(6)
        set_curvature(opt, [torch.linspace(0, 50, 6)])
        for step in range(3):
            (theta.grad,) = noise_like([theta], step)
            opt.step()
        assert theta.requires_grad
        assert theta.is_leaf != differentiable
        results.append(theta.detach())
    assert torch.equal(*results)
