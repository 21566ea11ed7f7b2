"""Frozen parameters are held, as AdamW holds them; parameters that nobody trains are named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaWarning

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def step(model, opt, times=1):
    for _ in range(times):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        opt.step()


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson", "empirical_fisher"])
def test_what_is_unfrozen_later_is_trained(estimator):
    """Gradual unfreezing: the layer stayed as it was for ever, and nothing zeroed its gradient."""
    model = network()
    model[0].requires_grad_(False)
    opt = Sophia(model, lr=1e-2, update_every=2, **settings_of(estimator))
    before = model[0].weight.clone()
    for _ in range(3):
        step(model, opt)
    assert torch.equal(model[0].weight, before)
    assert set(opt.state) == set(model[2].parameters())
    model[0].requires_grad_(True)
    for _ in range(2):
        step(model, opt)
    assert not torch.equal(model[0].weight, before)
    assert float(opt.state[model[0].weight]["hessian"].abs().max()) > 0
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def settings_of(estimator):
    """How the mean loss is found where the model returns none."""
    if estimator == "gnb":
        return {}
    from sophia.curvature import EmpiricalFisher, Hutchinson

    kind = {"hutchinson": Hutchinson, "empirical_fisher": EmpiricalFisher}[estimator]
    return {"estimator": kind(loss_fn=lambda output, args, kwargs: F.cross_entropy(output, Y))} | {
        "fraction": 1.0
    }


def test_what_is_frozen_in_the_middle_keeps_its_state():
    """The h of a layer that rests for a while must not decay to zero."""
    model = network()
    opt = Sophia(model, lr=1e-2, update_every=1)
    step(model, opt)
    model[0].requires_grad_(False)
    h, weight = opt.state[model[0].weight]["hessian"].clone(), model[0].weight.clone()
    for _ in range(2):
        step(model, opt)
    assert torch.equal(opt.state[model[0].weight]["hessian"], h)
    assert torch.equal(model[0].weight, weight)


def test_parameters_left_out_of_the_groups_are_named_once():
    """A list of parameters that forgot some: they have a gradient, and nobody moves them."""
    model = network()
    opt = Sophia([model[2].weight], model=model, update_every=2)
    with pytest.warns(
        SophiaWarning,
        match=r"3 parameters have a gradient and are in no group \(0.weight, 0.bias, 2.bias\)",
    ) as said:
        step(model, opt, times=7)
    assert len(said) == 1


class ByData(torch.optim.Optimizer):
    """Writes past the counter of versions, as old code does."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize(
    "other",
    [torch.optim.AdamW, ByData, lambda ps: Sophia(ps, mode="manual")],
    ids=["AdamW", "by .data", "a second Sophia"],
)
@pytest.mark.parametrize("every", [1, 3], ids="every {}".format)
def test_parameters_of_another_optimizer_raise_no_alarm(other, every):
    """Embeddings by AdamW beside Sophia, in its own rhythm. Warnings are errors here."""
    model = network()
    opt = Sophia([model[2].weight], model=model, update_every=every)
    second = other([p for p in model.parameters() if p is not model[2].weight])
    for number in range(12):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        opt.step()
        if number % every == 0:
            second.step()


def test_a_model_frozen_and_extended_afterwards_is_said_at_once():
    """PEFT around a model that Sophia holds already: nothing trains, and the reason was guessed wrongly."""
    model = network()
    opt = Sophia(model)
    held = list(model.parameters())
    before = [p.detach().clone() for p in held]
    model.requires_grad_(False)
    model[0].adapter = nn.Parameter(torch.zeros(5))
    model[0].register_forward_hook(lambda module, args, output: output + module.adapter)
    with pytest.warns(
        SophiaWarning,
        match=r"all 4 parameters of this optimizer are frozen .*while 1 parameters of the model have a "
        r"gradient and are in no group \(0.adapter\): this step trains nothing.*after that",
    ) as said:
        step(model, opt, times=30)
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_a_model_that_is_all_frozen_says_so():
    """Not "logits detached?"."""
    model = network()
    opt = Sophia(model)
    model.requires_grad_(False)
    model(X)
    with pytest.warns(SophiaWarning, match=r"all 4 parameters of this optimizer are frozen.*Unfreeze what"):
        opt.step()


def test_words_for_nothing_to_train():
    """No parameters at all is another mistake than all of them frozen."""
    with pytest.raises(ValueError, match="Tanh has no parameters, so there is nothing to train"):
        Sophia(nn.Tanh())
    with pytest.raises(ValueError, match="all 2 are frozen"):
        Sophia(nn.Linear(2, 2).requires_grad_(False))


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(4))


def test_integers_are_not_held():
    """Quantized weights: no optimizer can move them."""
    names = [n for g in Sophia(Quantized(), mode="manual").param_groups for n in g["param_names"]]
    assert names == ["scale"]
