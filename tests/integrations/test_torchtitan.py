"""docs/hosts/torchtitan.md, and the pattern of its optimizer container without it."""

import importlib.util

import pytest
import torch
from pages import refreshed, run, watching
from tiny_hosts import pairs
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sophia import Sophia
from sophia.step.kernels import fused_cpu
from tiny import GPT, T, data


@pytest.mark.skipif(
    not (importlib.util.find_spec("torchtitan") and importlib.util.find_spec("triton")),
    reason="needs torchtitan 0.2.2 and triton",
)
@pytest.mark.filterwarnings("ignore")  # torchtitan's imports warn of much
def test_page():
    """A container that passes settings on to the class, and a schedule that looks into its groups."""
    names, steps = run(
        "torchtitan.md", "The optimizer container", model=GPT(), batches=pairs(96, batch_size=4)
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}
    assert steps[0].lr < steps[-1].lr == 6e-4
    again = GPT()
    settings = {"model": again, "fused": False, "foreach": True}
    other = type(names["optimizers"])([again], Sophia, settings)
    other.load_state_dict(names["optimizers"].state_dict())
    assert_same_state(names["model"], names["optimizers"].optimizers[0], again, other.optimizers[0])


class Container(torch.optim.Optimizer):
    """One optimizer for each part of a model, one flat state: what large codes put around a class."""

    def __init__(self, parts, kind, settings):
        self.parts = parts
        self.optimizers = [kind(list(part.parameters()), **settings) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], settings)

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        pairs = zip(self.parts, self.optimizers, strict=True)
        return {k: v for pair in pairs for k, v in get_optimizer_state_dict(*pair, options=options).items()}

    def load_state_dict(self, state_dict):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=options)


def assert_same_state(model, optimizer, other_model, other):
    assert other.param_groups[0]["step"] == optimizer.param_groups[0]["step"] == 12
    assert other.param_groups[0]["refreshed"] == 10
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        for name in ("exp_avg", "hessian"):
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


FUSED = pytest.param(
    {"fused": True, "foreach": False},
    marks=pytest.mark.skipif(fused_cpu.unavailable() is not None, reason="the compiled step was not built"),
)


@pytest.mark.parametrize(
    "path", [FUSED, {"fused": False, "foreach": True}, {"fused": False, "foreach": False}]
)
def test_the_container_pattern(path):
    """Both choices are always given there, and the flat state must hold the books of the refreshes."""
    model = GPT(layers=1)
    container = Container([model], Sophia, {"model": model, "lr": 1e-3, **path})
    with watching() as steps:
        for number in range(24):
            (model(*data(4, seed=number))[1] / 2).backward()
            if number % 2:
                container.step()
                container.zero_grad()
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    again = GPT(layers=1)
    other = Container([again], Sophia, {"model": again, **path})
    other.load_state_dict(container.state_dict())
    assert_same_state(model, container.optimizers[0], again, other.optimizers[0])
