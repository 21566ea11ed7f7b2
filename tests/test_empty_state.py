"""The step with which ``torch.distributed.checkpoint`` asks for empty state, told from a step of a training.

It comes with lr = 0 and zero gradients. Today it comes if no parameter has state; torch's main branch is
about to ask for each parameter that has none, in the middle of a training too (pytorch#192307).
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import functional as F

from sophia import Sophia
from tiny import GPT, data

K = 3


def asked_by_parameter(opt):
    """Ask for the state that is missing, of all parameters at once."""
    parameters = [p for group in opt.param_groups for p in group["params"]]
    if any(p.grad is not None for p in parameters):
        return
    missing = [p for p in parameters if p.requires_grad and not opt.state.get(p)]
    ask(opt, missing)


def asked_one_by_one(opt):
    """The same, a step for each."""
    for p in [p for group in opt.param_groups for p in group["params"] if p.requires_grad]:
        if not opt.state.get(p):
            ask(opt, [p])


def ask(opt, missing):
    for p in missing:
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    if missing:
        opt.step()
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    opt.zero_grad(set_to_none=True)


def train(model, opt, steps):
    for step in range(steps):
        opt.zero_grad()
        if opt.mode == "manual" and step % K == 0:
            with opt.hessian_pass() as hp:
                hp.sampled_loss(model(data(4)[0])[0]).backward()
        model(*data(4))[1].backward()
        opt.step()
    opt.zero_grad()


def everything(model, opt):
    """Weights, state and books, to compare bit for bit."""
    tensors = [t for p in model.parameters() for t in (p, *opt.state.get(p, {}).values())]
    books = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return [t.detach().clone() for t in tensors], copy.deepcopy(books)


def equal(one, two):
    return one[1] == two[1] and len(one[0]) == len(two[0]) and all(map(torch.equal, one[0], two[0]))


def partly_trained(steps, **settings):
    """A model whose head was frozen for so many steps, and is not from now on."""
    model = GPT(layers=1, tied=False)
    model.head.requires_grad_(False)
    opt = Sophia(model, lr=1e-2, update_every=K, seed=3, **settings)
    train(model, opt, steps)
    model.head.requires_grad_(True)
    return model, opt


@pytest.mark.parametrize("asked", [asked_by_parameter, asked_one_by_one, dcp._init_optim_state])
@pytest.mark.parametrize("settings", [{}, {"rule": "damped"}, {"mode": "manual"}], ids=str)
@pytest.mark.parametrize("steps", range(K + 1))
def test_a_request_is_no_step_of_the_training(steps, settings, asked):
    """A checkpoint written in between would shift the refreshes, or draw other labels from there on."""
    model, opt = partly_trained(steps, **settings)
    before = everything(model, opt)
    asked(opt)
    asks = asked is not dcp._init_optim_state or steps == 0
    assert all(opt.state.get(p) for p in model.parameters()) == asks
    assert everything(model, opt)[1] == before[1]
    assert all(p.grad is None for p in model.parameters())
    train(model, opt, K + 1)
    expected = partly_trained(steps, **settings)
    train(*expected, K + 1)
    assert equal(everything(model, opt), everything(*expected))


def test_the_state_dict_is_whole_when_torch_asks_by_parameter(monkeypatch):
    """What a checkpoint then holds; today's torch leaves the head out."""
    monkeypatch.setattr(dcp, "_init_optim_state", asked_by_parameter)
    model, opt = partly_trained(K)
    saved = dcp.get_optimizer_state_dict(model, opt)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    fresh, other = partly_trained(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.set_optimizer_state_dict(fresh, other, saved)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert all(torch.equal(opt.state[p][key], other.state[q][key]) for key in opt.state[p])


class Two(nn.Module):
    """Two layers whose second can be trained without the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("factor", [1.0, 0.0], ids=["a gradient", "a gradient of zero"])
@pytest.mark.parametrize("steps", range(1, K + 1))
def test_a_step_that_begins_at_lr_zero_is_a_step(steps, factor):
    """A second schedule for an unfrozen head, from zero: if some ranks took it for a request (those whose
    shards of the head are empty have no other gradient), their next refresh would come later than the others'
    and wait for ever.
    """
    model, x, y = Two(), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    model.head.requires_grad_(False)
    opt = Sophia(model, lr=1e-2, update_every=K)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    model.body.requires_grad_(False)
    model.head.requires_grad_(True)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 10)
    assert opt.param_groups[0]["lr"] == 0.0
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refresh of a loss that is zero is spoken of
        (factor * F.cross_entropy(model(x), y)).backward()
        opt.step()
    assert opt.param_groups[0]["step"] == steps + 1
