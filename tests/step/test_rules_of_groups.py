"""A group with a rule of its own is moved as that rule moves: its settings, and its kinds of tensors."""

import copy
import io

import pytest
import torch
from torch import nn

from reference import give, noise_like
from sophia import Sophia
from sophia.step.rules import DAMPED, PAPER, RULES
from tiny import GPT, trained

SETTINGS = ("betas", "gamma", "eps", "damping", "update_every")


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_given_to_all_groups_is_that_rule(rule):
    """The published rule's decays, or one scale for hidden matrices and table, under another rule's name."""
    one, other = GPT(), GPT()
    other.load_state_dict(one.state_dict())
    by_argument = Sophia(one, lr=0.01, rule=rule, weight_decay=0.1)
    by_groups = Sophia(Sophia.groups(other, {"*": {"rule": rule}}, weight_decay=0.1), model=other, lr=0.01)
    for p, q in zip(trained(one, by_argument, steps=6), trained(other, by_groups, steps=6), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", ["damped", "whitened"])
def test_without_the_model_the_kinds_are_found(rule):
    """A group given as in a host, by parameters alone."""
    model = GPT()
    alone = Sophia([{"params": list(model.parameters()), "rule": rule}])
    assert len({group["scale"] for group in alone.param_groups}) > 1


def test_what_is_given_comes_before_the_rules_own():
    """The optimizer's argument is for all groups that do not say otherwise."""
    model = nn.Linear(3, 3)
    groups = [{"params": [model.weight], "rule": "damped", "gamma": 0.7}, {"params": [model.bias]}]
    opt = Sophia(groups, model=model, betas=(0.5, 0.6), lr=0.1)
    weight, bias = opt.param_groups
    assert weight["betas"] == bias["betas"] == (0.5, 0.6)
    assert (weight["gamma"], bias["gamma"]) == (0.7, PAPER.gamma)
    assert weight["scale"] == DAMPED.kind_scales[1]  # the last linear layer is the head


def test_a_scale_that_is_given_stays():
    model = GPT()
    opt = Sophia([{"params": list(model.parameters()), "rule": "damped", "scale": 0.5}], model=model)
    assert [group["scale"] for group in opt.param_groups] == [0.5]


def remade(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [lambda opt: opt, copy.deepcopy, remade], ids=["itself", "copy", "pickle"])
def test_a_group_that_joins_late(again):
    """A copy that has forgotten what its maker was given, and takes the first rule's values for another's."""
    model = nn.Linear(3, 3)
    opt = again(Sophia([model.weight], mode="manual", lr=0.1, eps=1e-10))
    late = nn.Parameter(torch.zeros(3))
    opt.add_param_group({"params": [late], "rule": "damped", "scale": 4.0})
    group = opt.param_groups[-1]
    assert [group[name] for name in SETTINGS] == [
        1e-10 if name == "eps" else getattr(DAMPED, name) for name in SETTINGS
    ]
    give([late], noise_like([late], 0))
    opt.step()


def test_by_hand_the_kinds_cannot_be_found():
    """Without a model there is nothing to tell them by."""
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="or that of a group, tells hidden matrices"):
        Sophia([{"params": list(model.parameters()), "rule": "damped"}], mode="manual")


def test_a_late_group_of_kinds_needs_the_model_or_a_scale():
    """One scale for hidden matrices and table under a rule that has two."""
    model = nn.Linear(3, 3)
    opt = Sophia([model.weight], mode="manual", lr=0.1)
    with pytest.raises(ValueError, match="or give the group a 'scale'"):
        opt.add_param_group({"params": [model.bias], "rule": "damped"})
    assert len(opt.param_groups) == 1
    opt.attach(model)
    opt.add_param_group({"params": [model.bias], "rule": "damped"})
    assert opt.param_groups[-1]["scale"] == DAMPED.kind_scales[1]


def test_groups_in_any_iterable_are_told_apart():
    """The values of a dict, which are neither a list nor an iterator."""
    model = GPT()
    groups = {"all": {"params": list(model.parameters()), "rule": "damped"}}
    opt = Sophia(groups.values(), model=model)
    assert {group["scale"] for group in opt.param_groups} == set(DAMPED.kind_scales)


@pytest.mark.parametrize("wrong", [["spectral"], None, 3, "spectrall"])
def test_a_rule_that_is_none_is_refused_with_the_names_of_all(wrong):
    with pytest.raises(ValueError, match="give one of 'paper', 'damped'"):
        Sophia([{"params": [nn.Parameter(torch.zeros(2))], "rule": wrong}], mode="manual")


def test_gamma_is_for_the_group_that_has_curvature():
    """Refused as without effect beside a group that it is for."""
    model = GPT()
    groups = Sophia.groups(model, {"tokens.*": {"rule": "damped"}})
    opt = Sophia(groups, model=model, rule="whitened", gamma=0.3)
    assert {group["gamma"] for group in opt.param_groups if group["rule"] == "damped"} == {0.3}
    with pytest.raises(ValueError, match="no curvature for gamma"):
        Sophia(model, rule="whitened", gamma=0.3)


def test_a_late_group_of_another_module_needs_a_scale():
    """Its hidden matrices would move as far as a table, since no model that is known has them."""
    model, other = GPT(), GPT()
    opt = Sophia(model, rule="damped", lr=0.1)
    before = len(opt.param_groups)
    with pytest.raises(ValueError, match="none is known here that has these parameters"):
        opt.add_param_group({"params": list(other.parameters())})
    assert len(opt.param_groups) == before
