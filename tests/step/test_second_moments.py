"""The rules without curvature: equations against numpy, what is kept, and that nothing is refreshed."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from reference import array, give, noise_like
from sophia import Sophia
from sophia.diagnostics import advice
from sophia.step.rules import FACTORED, WHITENED
from tiny import GPT, data, trained

HIDDEN = ("up.weight", "down.weight")


class Block(nn.Module):
    """A table longer than wide, two hidden matrices, a gain, and a head wider than long."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6, bias=False)
        self.head = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(self.embedding(x)).relu())))


def along(matrix, basis):
    return np.einsum("ij,ik,kj->j", basis, matrix, basis)


def power(values, basis, p, damping):
    """Of a symmetric matrix, by its values along the eigenvectors of another step."""
    return basis @ np.diag((values / values.mean() + damping) ** p) @ basis.T


class Whitened:
    """The step of a hidden matrix in numpy, with a decomposition in place of the iteration."""

    def __init__(self, theta):
        self.theta, self.m, self.moment = theta, 0.0, 0.0

    def step(self, g, number, lr):
        self.m = 0.9 * self.m + 0.1 * g
        u = 0.9 * self.m + 0.1 * g
        flip = u.shape[0] > u.shape[1]
        u, g = (u.T, g.T) if flip else (u, g)
        self.moment = 0.9 * self.moment + 0.1 * g @ g.T
        if number % 5 == 0:
            self.basis = np.linalg.eigh(self.moment)[1]
        root = power(along(self.moment, self.basis), self.basis, -1 / 8, 1e-4)
        mean = (u**2).mean(0)
        columns = (mean / mean.mean() + 1e-4) ** (-1 / 8)
        left, _, right = np.linalg.svd(root @ u * columns, full_matrices=False)
        d = root @ (left @ right) * columns
        d = d.T if flip else d
        self.theta = self.theta * (1 - lr * 0.1) - 0.3 * lr * d / np.sqrt((d**2).mean())


class Factored:
    """Adam with a factored second moment in numpy; Adam for a vector."""

    def __init__(self, theta, decay):
        self.theta, self.decay = theta, decay
        self.m = self.v = self.moment = self.values = 0.0

    def step(self, g, number, lr):
        self.m = 0.8 * self.m + 0.2 * g
        m, started = self.m / (1 - 0.8 ** (number + 1)), 1 - 0.95 ** (number + 1)
        if g.ndim == 1:
            self.v = 0.95 * self.v + 0.05 * g**2
            d = m / (np.sqrt(self.v / started) + 1e-8)
        else:
            flip = g.shape[0] > g.shape[1]
            g, m = (g.T, m.T) if flip else (g, m)
            self.moment = 0.95 * self.moment + 0.05 * g @ g.T
            if number % 5 == 0:
                self.basis = np.linalg.eigh(self.moment)[1]
            self.values = 0.95 * self.values + 0.05 * along(g @ g.T, self.basis)
            root = power(self.values, self.basis, -1 / 2, 1e-6)
            self.v = 0.95 * self.v + 0.05 * (g**2).mean(0)
            d = root @ m / (np.sqrt(self.v / started) + 1e-8)
            d = d.T if flip else d
        self.theta = self.theta * (1 - lr * self.decay) - lr * d


def test_twelve_steps_against_numpy():
    """A root of the wrong side, a scale of the other, a correction left out: each is another trajectory."""
    torch.manual_seed(0)
    model = Block().double()
    named = dict(model.named_parameters())
    ours = {
        n: Whitened(array(p)) if n in HIDDEN else Factored(array(p), 0.1 if p.ndim == 2 else 0.0)
        for n, p in named.items()
    }
    optimizer = Sophia(model, lr=0.01, rule="whitened", weight_decay=0.1)
    for number in range(12):
        gradients = noise_like(list(named.values()), number)
        give(list(named.values()), gradients)
        optimizer.step()
        for name, g in zip(named, gradients, strict=True):
            ours[name].step(array(g), number, 0.01)
    for name, p in named.items():
        moved = np.abs(array(p) - ours[name].theta).max() / 0.01
        # The iteration leaves singular values between 0.7 and 1.2, numpy's decomposition at 1.
        assert moved < (2.0 if name in HIDDEN else 1e-8), name
        if name in HIDDEN:
            a, b = array(p) - array(p).mean(), ours[name].theta - ours[name].theta.mean()
            assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_a_model_of_vectors_is_moved_by_adam():
    """What no matrix rule knows must not be left to a formula of its own: it is torch's Adam to rounding."""
    ours = nn.ParameterList([nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(3))])
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "betas": (0.8, 0.95)}
    opts = [
        Sophia(list(ours), model=ours, rule="whitened", eps=1e-8, weight_decay=0.0, **settings),
        torch.optim.Adam(theirs, eps=1e-8, **settings),
    ]
    for number in range(7):
        for module, optimizer in zip((ours, theirs), opts, strict=True):
            give(list(module), noise_like(list(module), number))
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_directions_without_a_gradient_do_not_move():
    """Rounding in the null space of the gradients, divided by its own size: a table moved by noise."""
    table = nn.Embedding(40, 16)
    optimizer = Sophia(table, lr=0.01, rule="whitened", weight_decay=0.0)
    before = table.weight.detach().clone()
    span = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for number in range(12):
        (weights,) = noise_like([torch.zeros(40, 3)], number)
        give([table.weight], [weights @ span])
        optimizer.step()
    moved = table.weight.detach() - before
    inside = torch.linalg.qr(span.T).Q
    outside = moved - moved @ inside @ inside.T
    assert float(outside.norm() / moved.norm()) < 0.01


def test_nothing_is_refreshed_and_the_model_is_not_run():
    """A rule without curvature that pays for it all the same, or that stops a loop whose model hides its
    predictions.
    """
    model = GPT()
    calls = []
    optimizer = Sophia(model, lr=0.01, rule="whitened")
    model.register_forward_hook(lambda *a: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, optimizer, steps=12)
    assert len(calls) == 12
    stats = optimizer.stats()
    assert (stats["refreshes"], stats["has_curvature"], stats["own_rule"]) == (0.0, 0.0, 1.0)
    assert advice(stats) == ""
    assert not any("hessian" in state for state in optimizer.state.values())
    assert len(model._forward_hooks) == 1  # the test's


def test_state_is_no_more_than_adamws():
    """The short side's moment and eigenvectors count: with GPT-2's shapes that is below 8 bytes a number."""
    width = 32
    block = nn.ModuleList(
        [nn.Linear(width, n * width, bias=False) for n in (3, 1, 4)]
        + [nn.Linear(4 * width, width, bias=False)]
    )
    head = nn.Linear(width, 64)  # the layer registered last is the head
    model = nn.Sequential(*block, head)
    optimizer = Sophia(model, lr=0.01, rule="whitened")
    parameters = list(block.parameters())
    give(list(model.parameters()), noise_like(list(model.parameters()), 0))
    optimizer.step()
    held = sum(v.numel() * v.element_size() for p in parameters for v in optimizer.state[p].values())
    assert held / sum(p.numel() for p in parameters) < 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_a_file(dtype):
    """Roots and bases that are not in the file would be those of zeros until they are next due."""
    runs = []
    for stop in (None, 7):
        torch.manual_seed(0)
        model = GPT()
        optimizer = Sophia(model, lr=0.01, rule="whitened", state_dtype=dtype)
        for number in range(12):
            if number == stop:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = Sophia(model, lr=0.01, rule="whitened", state_dtype=dtype)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            give(list(model.parameters()), noise_like(list(model.parameters()), number))
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


def test_a_file_of_the_first_version_goes_on():
    """That had no squares along the eigenvectors: they begin with what it took in their place."""
    model = GPT()
    optimizer = Sophia(model, lr=0.01, rule="whitened")
    give(list(model.parameters()), noise_like(list(model.parameters()), 0))
    optimizer.step()
    loaded = copy.deepcopy(optimizer.state_dict())
    expected = {k: s.pop("basis_squares") for k, s in loaded["state"].items() if "basis_squares" in s}
    optimizer.load_state_dict(loaded)
    again = optimizer.state_dict()["state"]
    assert expected
    for number, squares in expected.items():
        torch.testing.assert_close(again[number]["basis_squares"], squares, rtol=1e-4, atol=1e-9)


def test_groups_of_both_kinds_in_one_optimizer():
    """Curvature for a part of the model: h is renewed for that part, and for it alone."""
    model = GPT()
    groups = Sophia.groups(model, {"*.qkv.*": {"rule": "factored", "scale": 0.05}})
    optimizer = Sophia(groups, model=model, lr=0.01, update_every=2)
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert ("hessian" in optimizer.state[p]) == (group["rule"] == "paper")
    stats = optimizer.stats()
    assert stats["refreshes"] == 2
    assert 0 < stats["has_curvature"] < 1


def test_a_group_may_change_its_rule():
    """A stage of training under another rule: what that keeps starts at zero, and a file takes both."""
    model = GPT()
    optimizer = Sophia(model, lr=0.01, mode="manual", rule="damped")
    for number in range(4):
        if number == 2:
            for group in optimizer.param_groups:
                group["rule"] = "factored"
        give(list(model.parameters()), noise_like(list(model.parameters()), number))
        optimizer.step()
    assert all({"exp_avg_sq", "mean_squares"} & set(state) for state in optimizer.state.values())
    other = Sophia(model, lr=0.01, mode="manual", rule="damped")
    with pytest.warns(match="rule='factored'"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.1}, r"gamma=0.1 with rule='whitened': that rule has no curvature"),
        ({"capturable": True}, r"rule='whitened' decomposes matrices .* capturable=True"),
        ({"differentiable": True}, r"rule='whitened' decomposes matrices"),
        ({"update_every": 0}, r"update_every=0"),
        # the damped rule's, in a script from when the spectral one had a curvature
        ({"damping": 0.5}, r"damping=0.5 .* second moments .* rule='damped'.* at most 0.1"),
        ({"rule": "spectral", "damping": 0.5}, r"damping=0.5 with rule='spectral'"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        Sophia(GPT(), **{"rule": "whitened", **settings})


def test_settings_that_are_not_given_are_each_rules_own():
    """The table trained with the decay of the hidden matrices, or the user's value overwritten."""
    optimizer = Sophia(GPT(), rule="whitened")
    of = {group["rule"]: group for group in optimizer.param_groups}
    assert of["whitened"]["betas"] == WHITENED.betas
    assert of["factored"]["betas"] == FACTORED.betas
    given = Sophia(GPT(), rule="whitened", betas=(0.7, 0.6))
    assert {group["betas"] for group in given.param_groups} == {(0.7, 0.6)}


def test_what_is_unfrozen_late_begins_late():
    """A root of zeros, by which it would not move until the group's next decomposition; or second moments
    that are corrected by the group's steps and not by its own, which would make its first steps too long.
    """
    late, early = Block(), Block()
    late.load_state_dict(early.state_dict())
    opts = [Sophia(m, lr=0.01, rule="whitened", weight_decay=0.0) for m in (late, early)]
    give(list(late.parameters()), noise_like(list(late.parameters()), 9))
    for p in (late.up.weight, late.head.weight, late.norm.weight):
        p.grad = None  # frozen for the first steps
    for _ in range(3):
        opts[0].step()
    for number in range(4):
        for model, optimizer in ((late, opts[0]), (early, opts[1])):
            give(list(model.parameters()), noise_like(list(model.parameters()), number))
            optimizer.step()
    for name in ("up", "head", "norm"):
        assert torch.equal(getattr(late, name).weight, getattr(early, name).weight), name
    assert not torch.equal(late.down.weight, early.down.weight)


def test_settings_of_curvature_have_no_effect_and_are_told():
    """A user who asks for Hutchinson and gets a rule that never looks at it."""
    with pytest.warns(match=r"estimator='hutchinson', mask_fn has no effect: .*rule='whitened' has none"):
        Sophia(GPT(), rule="whitened", estimator="hutchinson", mask_fn=lambda *a: None)
    optimizer = Sophia(GPT(), rule="whitened")
    with pytest.raises(RuntimeError, match="nothing to refresh"), optimizer.hessian_pass():
        pass


def test_maximize_climbs():
    up, down = Block(), Block()
    down.load_state_dict(up.state_dict())
    before = [p.detach().clone() for p in up.parameters()]
    for model, maximize in ((up, True), (down, False)):
        optimizer = Sophia(model, lr=0.01, rule="whitened", maximize=maximize, weight_decay=0.0)
        give(list(model.parameters()), noise_like(list(model.parameters()), 0))
        optimizer.step()
    for p, q, b in zip(up.parameters(), down.parameters(), before, strict=True):
        torch.testing.assert_close(p - b, b - q, rtol=1e-4, atol=1e-6)
