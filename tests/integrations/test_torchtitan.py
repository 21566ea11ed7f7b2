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

from needs import torch_from
from sophia import Sophia
from sophia.step.kernels import fused_cpu
from tiny import GPT, Bare, LabelsFromLogits, T, V, data, estimate_in_state, oracle, relative_error

needs_torchtitan = pytest.mark.skipif(
    not (importlib.util.find_spec("torchtitan") and importlib.util.find_spec("triton")),
    reason="needs torchtitan and triton (extra [hosts-pretraining])",
)


def cross_entropy_of_torchtitan(*, chunks=0):
    """Its sum over the tokens, divided by a count; of chunks that it makes the logits of, if any."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig

    config = CrossEntropyLoss.Config(global_vocab_size=V)
    if chunks:
        config = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=config)
    return config.build(compile_config=CompileConfig())


@needs_torchtitan
@pytest.mark.filterwarnings("ignore")  # torchtitan's imports warn of much
def test_page():
    """A container that knows no model, and a schedule that looks into its groups."""
    names, steps = run(
        "torchtitan.md",
        "The optimizer container",
        model=Bare(),
        batches=pairs(96, batch_size=4),
        loss_fn=cross_entropy_of_torchtitan(),
        tokens=torch.tensor(8 * T),
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}
    assert steps[0].lr < steps[4].lr == 3e-4
    again = Bare()
    other = names["Optimizers"].Config(param_groups=[names["every"]]).build(model_parts=[again])
    other.load_state_dict(names["optimizers"].state_dict())
    assert_same_state(names["model"], names["optimizers"].optimizers[0], again, other.optimizers[0])


@needs_torchtitan
@pytest.mark.filterwarnings("ignore")
def test_h_under_its_loss_is_the_oracle():
    """A sum over the tokens, divided by the count of the whole step, with tokens that do not count."""
    model, (x, y) = Bare(), data(padded=True)
    labels, loss_fn = y.masked_fill(y < 0, -100), cross_entropy_of_torchtitan()
    expected, count = oracle(model, x, y >= 0, lambda m, x: m(x))
    settings = {"fraction": 1.0, "likelihood": LabelsFromLogits()}
    opt = Sophia(model.parameters(), lr=0.0, weight_decay=0.0, **settings)
    for xs, ys in zip(x.split(4), labels.split(4), strict=True):
        loss_fn(model(xs), ys, torch.tensor(count))[0].backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


class Headless(Bare):
    """A model as torchtitan's are for the chunked loss: hidden states, to which the loss applies the head."""

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@needs_torchtitan
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("told", [False, True], ids=["plain", "logits_fn"])
def test_the_chunked_loss(told):
    """The head that the loss applies is found in the model."""
    model, (x, y) = Headless(tied=False), data(4)
    loss_fn = cross_entropy_of_torchtitan(chunks=4)
    loss_fn.set_lm_head(model.head)
    expected, count = oracle(model, x, y >= 0, lambda m, x: m.head(m(x)))
    extra = {"logits_fn": lambda hidden: model.head(hidden)} if told else {}
    opt = Sophia(model.parameters(), lr=0.0, fraction=1.0, likelihood=LabelsFromLogits(), **extra)
    loss_fn(model(x), y, torch.tensor(count))[0].backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


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


@torch_from("2.7", "flat states of tied weights that it can load, of any optimizer")
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
