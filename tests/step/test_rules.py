"""The table of rules: a new rule is a row, and what the rest of the library asks of a row."""

import copy
import dataclasses
import inspect
import io

import pytest
import torch

from sophia import Sophia
from sophia.step.groups import COUNTERS
from sophia.step.kernels import (
    damped_blocks,
    foreach,
    fused_cpu,
    fused_cuda,
    in_place,
    matrices_cpu,
    single_tensor,
)
from sophia.step.rules import DAMPED, FACTORED, PAPER, RULES, SPECTRAL, WHITENED, Rule, StepSettings
from tiny import GPT, trained

IDENTITY = Rule("identity", lambda u, h, size, s: u, betas=(0.5, 0.9), gamma=1.0, lr_over_adamw=3.0)
KERNELS = (damped_blocks, foreach, fused_cpu, fused_cuda, in_place, matrices_cpu, single_tensor)


@pytest.fixture
def identity(monkeypatch):
    monkeypatch.setitem(RULES, "identity", IDENTITY)


def test_a_rule_is_one_row(identity):
    """A rule that must be written in ten files: the row alone has to give defaults, direction and refreshes.

    The identity's step is lr times the average of the gradients, which is torch's SGD with dampened momentum.
    """
    model = GPT().double()
    twin = copy.deepcopy(model)
    opt = Sophia(model, lr=0.1, rule="identity", weight_decay=0.0, update_every=2)
    assert all(g["betas"] == (0.5, 0.9) and g["gamma"] == 1.0 for g in opt.param_groups)
    got = trained(model, opt)
    stats = opt.stats()
    assert (stats["refreshes"], stats["own_rule"]) == (2.0, 1.0)
    assert any(bool(state["hessian"].any()) for state in opt.state.values())
    # The first gradient enters SGD's buffer whole; ours starts at zero.
    slow = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5, dampening=0.5)
    for p in twin.parameters():
        slow.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for ours, theirs in zip(got, trained(twin, slow), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_new_rule_goes_through_a_file(identity):
    """A name in a checkpoint that the loader takes for another rule, or drops."""
    model = GPT()
    opt = Sophia(model, rule="identity")
    trained(model, opt)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = GPT()
    again.load_state_dict(weights)
    other = Sophia(again, rule="identity")
    other.load_state_dict(state)
    assert {g["rule"] for g in other.param_groups} == {"identity"}
    for p, q in zip(trained(model, opt), trained(again, other), strict=True):
        assert torch.equal(p, q)


def test_a_new_rule_beside_others_in_one_optimizer(identity):
    """Groups of two rules mixed up in one call of a kernel."""
    model = GPT()
    first, *rest = model.parameters()
    before = first.detach().clone()
    groups = [{"params": [first], "rule": "identity", "weight_decay": 0.0}, {"params": rest}]
    opt = Sophia(groups, model=model, lr=0.1)
    trained(model, opt, steps=1)
    torch.testing.assert_close(first.detach(), before - 0.1 * opt.state[first]["exp_avg"])
    assert {g["rule"] for g in opt.param_groups} == {"identity", "paper"}
    assert 0 < opt.stats()["own_rule"] < 1


def test_a_new_rule_compiles(identity):
    """A graph that bakes one rule's arithmetic in for all."""
    plain, compiled = GPT(), GPT()
    compiled.load_state_dict(plain.state_dict())
    opts = [Sophia(m, lr=0.1, rule="identity", mode="manual") for m in (plain, compiled)]
    torch.manual_seed(0)
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    opts[0].step()
    torch.compile(opts[1].step, backend="eager")()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_lr_from_adamw_is_the_rows(identity):
    """A tuned AdamW's lr translated by another rule's ratio."""
    model = torch.nn.Linear(2, 2)
    source = {"lr": 0.01, "weight_decay": 0.3}
    for rule in RULES.values():
        group = Sophia.from_adamw(source, model, rule=rule.name).param_groups[0]
        assert group["lr"] == pytest.approx(0.01 * rule.lr_over_adamw)


def test_tensors_that_are_no_matrices_are_moved_by_the_stand_in():
    """A bias under the spectral rule, which has no singular values."""
    assert SPECTRAL.moving(torch.zeros(3)) is FACTORED
    assert SPECTRAL.moving(torch.zeros(3, 4)) is SPECTRAL
    assert PAPER.moving(torch.zeros(3)) is PAPER


def test_kernels_name_rules_of_the_table():
    """A path that claims a rule which it was not held to: each claim has its test against the plain path."""
    claimed = {k.__name__.rpartition(".")[2]: k.IMPLEMENTED for k in KERNELS if k is not single_tensor}
    assert claimed == {
        "damped_blocks": (DAMPED,),
        "foreach": (PAPER,),
        "fused_cpu": (PAPER, DAMPED),
        "fused_cuda": (PAPER,),
        "in_place": (SPECTRAL, WHITENED, FACTORED),
        "matrices_cpu": (SPECTRAL,),
    }


def test_every_key_of_a_group_is_a_setting_or_a_counter():
    """A book kept under a key that nothing names or explains."""
    arguments = set(inspect.signature(Sophia).parameters)
    (group,) = Sophia([torch.nn.Parameter(torch.zeros(2))], mode="manual").param_groups
    assert set(group) - arguments == {"params", "scale", *COUNTERS}
    assert {name: group[name] for name in COUNTERS} == COUNTERS


def test_kernels_take_one_signature():
    """A path that is called with arguments that another path has not."""
    signatures = {tuple(inspect.signature(kernel.step).parameters) for kernel in KERNELS}
    assert len(signatures) == 1
    assert "settings" in next(iter(signatures))
    assert issubclass(StepSettings, tuple)
    assert dataclasses.is_dataclass(Rule)
