"""A forward that is run again is the one recorded: its state, modes and random numbers, or words."""

import random
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaWarning

EVERY = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0), "update_every": 1, "fraction": 1.0}


class Remembering(nn.Module):
    """Adds to its outputs what an earlier forward has left in ``kind`` of place."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = nn.Linear(3, 5), kind
        self.number, self.items, self.nested, self.queue = 0, [], {"at": [torch.zeros(5)]}, deque(maxlen=2)
        self.frozen = nn.Parameter(torch.zeros(70_000), requires_grad=False)  # too large to be copied untold
        self.torchs, self.pythons = torch.Generator().manual_seed(1), random.Random(1)
        self.register_buffer("late", None)

    def forward(self, x):
        z = self.net(x)
        match self.kind:
            case "number":
                self.number += 1
                return z * (1 + self.number)
            case "list":
                self.items.append(2.0)
                return z * len(self.items)
            case "nested":
                self.nested["at"][0] += 1
                return z * self.nested["at"][0]
            case "queue":
                self.queue.append(self.queue[-1] + 1 if self.queue else 1)
                return z * self.queue[0]
            case "frozen":
                with torch.no_grad():
                    self.frozen.add_(1)
                return z * self.frozen[0]
            case "new attribute":
                self.seen = getattr(self, "seen", 0) + 1
                return z * self.seen
            case "late buffer":
                self.late = torch.ones(5) if self.late is None else self.late + 1
                return z * self.late
            case "torch.Generator":
                return z * torch.rand(5, generator=self.torchs)
            case _:
                return z * self.pythons.random()


KINDS = [
    "number",
    "list",
    "nested",
    "queue",
    "frozen",
    "new attribute",
    "late buffer",
    "torch.Generator",
    "random.Random",
]


def looked_at(model):
    place = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    place["torchs"], place["pythons"] = model.torchs.get_state().tolist(), model.pythons.getstate()
    return repr({**place, "late": model.late, "frozen": model.frozen.sum()})


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_that_a_forward_moves_is_put_back_and_its_function_repeated(kind):
    """State moved twice on due steps, or h of the function that follows."""
    torch.manual_seed(0)
    model = Remembering(kind)
    factors = []
    opt, x, y = Sophia(model, seed=3, **EVERY), torch.randn(6, 3), torch.arange(6) % 5
    for step in range(3):
        outputs = []
        handle = model.register_forward_hook(lambda m, a, z, to=outputs: to.append(z.detach()))
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        state = looked_at(model)
        opt.step()  # a warning is an error here: the repetition was proved
        handle.remove()
        assert looked_at(model) == state
        assert len(outputs) >= 2
        # A large tensor is copied from the second time on, when it is known to move
        repeated = kind != "frozen" or step > 0
        assert not repeated or all(torch.equal(z, outputs[0]) for z in outputs)
        factors.append(outputs[0])
    assert not torch.equal(factors[0], factors[2])


def test_an_object_that_cannot_be_put_back_is_said_once():
    """Another function in silence."""

    class Counter:
        calls = 0

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.counter = nn.Linear(3, 5), Counter()

        def forward(self, x):
            self.counter.calls += 1
            return self.net(x) * self.counter.calls

    model = Counting()
    opt, x, y = Sophia(model, **EVERY), torch.randn(6, 3), torch.arange(6) % 5
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(
        SophiaWarning, match=r"is not the same function \(its outputs differ by .*in a buffer, or"
    ):
        opt.step()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


def test_a_first_forward_that_sets_its_weights_is_not_undone():
    """Weights that are set from the first batch, set again by a refresh from a part of it."""

    class FromData(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.shift, self.ready = nn.Linear(3, 5), nn.Parameter(torch.zeros(3)), False

        def forward(self, x):
            if not self.ready:
                self.ready = True
                with torch.no_grad():
                    self.shift.copy_(x.mean(0))
            return self.net(x - self.shift)

    model = FromData()
    opt, x, y = Sophia(model, **{**EVERY, "fraction": 1 / 8}), torch.randn(16, 3), torch.arange(16) % 5
    F.cross_entropy(model(x), y).backward()
    version = model.shift._version
    opt._refresh_if_due()
    assert model.ready
    assert model.shift._version == version
    assert torch.equal(model.shift.detach(), x.mean(0))


def test_the_modes_of_the_forward_are_those_of_its_repetition():
    """A loop that evaluates between backward and step, and goes back to training afterwards."""
    modes = []
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 5))
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    opt, x, y = Sophia(model, **EVERY), torch.randn(6, 3), torch.arange(6) % 5
    F.cross_entropy(model(x), y).backward()
    model.eval()
    opt.step()
    assert len(modes) >= 3
    assert all(modes)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("how", ["optimizer", "by .data"])
def test_another_optimizer_that_steps_first_is_no_other_function(how):
    """A false alarm in loops with one optimizer for the matrices and one for the rest."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
    other = torch.optim.SGD(model[0].parameters(), lr=1.0)
    opt, x, y = Sophia(model[2].parameters(), model=model, **EVERY), torch.randn(6, 3), torch.arange(6) % 5
    for _ in range(2):
        other.zero_grad()
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if how == "optimizer":
            other.step()
        else:
            for p in model[0].parameters():
                p.data -= p.grad
        opt.step()


def test_weights_written_between_forward_and_step_are_said_once():
    """H at another point, in silence."""
    model = nn.Linear(3, 5)
    opt, x, y = Sophia(model, **EVERY), torch.randn(6, 3), torch.arange(6) % 5

    def step():
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model.weight.mul_(1.1)
        opt.step()

    with pytest.warns(SophiaWarning, match=r"1 of 2 parameters of Linear were written to between its"):
        step()
    step()


def test_hooks_on_parameters_run_in_a_pass_by_hand():
    """Sums over ranks that a user's hooks make, missing from h."""
    model, seen = nn.Linear(3, 5), []
    model.weight.register_hook(lambda g: seen.append(g.shape))
    opt = Sophia(model.parameters(), model=model, mode="manual")
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(torch.randn(6, 3))).backward()
    assert seen == [(5, 3)]
