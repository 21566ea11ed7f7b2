"""Parameter groups: their own settings, books and names; groups equal separate optimizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from reference import Given, curvature_of, noise_like, set_curvature
from sophia import Sophia

OWN = {"lr": 0.03, "betas": (0.8, 0.5), "gamma": 0.5, "eps": 1e-3, "weight_decay": 0.3, "maximize": True}


def parameters(n=3, dtype=torch.float32):
    return [nn.Parameter(torch.randn(4, 3, dtype=dtype)) for _ in range(n)]


def sophia_of(groups, **changed):
    common = {"lr": 0.02, "betas": (0.9, 0.8), "weight_decay": 0.1}
    return Sophia(groups, mode="manual", estimator=Given(), **{**common, **changed})


def train(opts, params, steps=5, start=0):
    """Steps of optimizers that own ``params`` together; gradients and curvature by step and parameter."""
    for step in range(start, start + steps):
        for p, g in zip(params, noise_like(params, step), strict=True):
            p.grad = g
        for opt in opts:
            own = [p for group in opt.param_groups for p in group["params"]]
            if step % 2 == 0:
                given = dict(zip(params, curvature_of(params, step), strict=True))
                set_curvature(opt, [given[p] for p in own])
            opt.step()


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("own", [{name: OWN[name]} for name in OWN] + [OWN], ids=lambda own: ", ".join(own))
def test_groups_equal_separate_optimizers(own, foreach):
    """A setting read from the defaults, or from the first group, in place of the group's own."""
    together = parameters()
    alone = copies(together)
    opt = sophia_of([{"params": together[:2]}, {"params": together[2:], **own}], foreach=foreach)
    train([opt], together)
    train([sophia_of(alone[:2], foreach=foreach), sophia_of(alone[2:], foreach=foreach, **own)], alone)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@given(
    cut=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    lrs=st.lists(st.sampled_from([0.0, 0.01, 0.1]), min_size=3, max_size=3),
)
@settings(max_examples=30)
def test_any_split_into_groups(cut, lrs):
    """A parameter that takes another group's settings for some order of the groups."""
    together = parameters(5)
    alone = copies(together)
    groups = [
        {"params": [p for p, c in zip(together, cut, strict=True) if c == k], "lr": lrs[k]} for k in range(3)
    ]
    groups = [group for group in groups if group["params"]]
    train([sophia_of(groups)], together, steps=3)
    train([sophia_of([p], lr=lrs[c]) for p, c in zip(alone, cut, strict=True)], alone, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_group_settings_changed_during_training_count():
    """Schedulers and users write into ``param_groups``; a cached copy would ignore them."""
    together = parameters()
    alone = copies(together)
    opt = sophia_of(together)
    other = sophia_of(alone)
    train([opt], together, 2)
    train([other], alone, 2)
    opt.param_groups[0].update(OWN)
    fresh = sophia_of(alone, **OWN)
    saved = other.state_dict()
    saved["param_groups"][0].update(OWN)
    fresh.load_state_dict(saved)
    train([opt], together, 3, start=2)
    train([fresh], alone, 3, start=2)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


class Classifier(nn.Module):
    """Two parameters, classes as outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_each_group_has_its_own_interval():
    """K of one group applied to all: too many passes, or h of a group that is never renewed."""
    model = Classifier()
    groups = [{"params": [model.first.weight]}, {"params": [model.last.weight], "update_every": 3}]
    estimator = Given()
    opt = Sophia(groups, model=model, update_every=2, betas=(0.9, 0.5), estimator=estimator)
    x, y = torch.randn(6, 3), torch.randint(0, 5, (6,))
    seen = []
    for step in range(7):
        estimator.diagonal_of = lambda p, step=step: torch.full_like(p, 2.0**step)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        seen.append([float(opt.state[p]["hessian"].max()) for p in (model.first.weight, model.last.weight)])
    first, last, a, b = [], [], 0.0, 0.0
    for step in range(7):
        a = (a + 2.0**step) / 2 if step % 2 == 0 else a
        b = (b + 2.0**step) / 2 if step % 3 == 0 else b
        first.append(a)
        last.append(b)
    assert [s[0] for s in seen] == first
    assert [s[1] for s in seen] == last
    assert [group["refreshes"] for group in opt.param_groups] == [4, 3]


# ---- groups that join later


def test_late_group_equals_an_optimizer_of_its_own():
    """Unfreezing a layer in the middle: it must neither inherit state nor disturb the others."""
    together = parameters()
    alone = copies(together)
    opt = sophia_of(together[:2])
    train([opt], together[:2], 4)
    opt.add_param_group({"params": together[2:], "lr": 0.05})
    train([opt], together, 4, start=4)
    first, late = sophia_of(alone[:2]), sophia_of(alone[2:], lr=0.05)
    train([first], alone[:2], 4)
    train([first, late], alone, 4, start=4)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_late_group_joins_at_the_current_step_without_a_false_alarm():
    """It would be due on other steps than the rest, or be told that its h was never renewed in 30 steps."""
    params = parameters()
    opt = sophia_of(params[:2], update_every=2)
    train([opt], params[:2], 30)
    opt.add_param_group({"params": params[2:]})
    assert [group["step"] for group in opt.param_groups] == [30, 30]
    params[2].grad = torch.ones_like(params[2])
    for _ in range(3):
        opt.step()  # a warning is an error here
    assert opt.param_groups[1]["refreshes"] == 0


def test_groups_of_equal_step_have_equal_books():
    """The seed of the noise and the step live in the groups: groups that disagree draw different noise."""
    params = parameters()
    opt = sophia_of([{"params": params[:1]}, {"params": params[1:2]}], seed=7)
    train([opt], params[:2], 3)
    resumed = sophia_of([{"params": params[:1]}, {"params": params[1:2]}], seed=0)
    resumed.load_state_dict(opt.state_dict())
    for one in (opt, resumed):
        one.add_param_group({"params": params[2:]})
        assert {(group["seed"], group["step"]) for group in one.param_groups} == {(7, 3)}


# ---- names


@pytest.mark.parametrize("as_groups", [False, True])
def test_named_parameters_keep_their_names(as_groups):
    """Checkpoint tools match parameters by ``param_names``."""
    model = Classifier()
    named = list(model.named_parameters())
    opt = sophia_of([{"params": [pair]} for pair in named] if as_groups else named)
    names = ["first.weight", "last.weight"]
    assert [n for g in opt.param_groups for n in g["param_names"]] == names
    assert [n for g in opt.state_dict()["param_groups"] for n in g["param_names"]] == names
    train([opt], list(model.parameters()), 1)


def test_named_and_unnamed_do_not_mix():
    """Torch refuses it; a class that accepts it saves half of the names."""
    a, b = parameters(2)
    with pytest.raises(
        ValueError, match=r"named parameters|all optimizer params should be with/without names"
    ):
        sophia_of([("a", a), b])
    opt = sophia_of([("a", a)])
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
