"""docs/hosts/torch.md, and torch's schedulers, averages and compiler around a Sophia in replay mode."""

import functools
from contextlib import nullcontext

import pytest
import torch
from pages import refreshed, run, watching
from tiny_hosts import pairs
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from sophia import Sophia, SophiaWarning
from tiny import GPT, T, V, data


def test_schedule_scaler_clipping_average():
    """The loop that most people write, with half of what torch.optim offers around the step."""
    names, steps = run(
        "torch.md",
        "Schedule, scaler, clipping, average",
        model=GPT(),
        batches=pairs(96, batch_size=4),
        device="cpu",
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}
    assert names["schedule"].get_last_lr()[0] < 6e-4
    assert int(names["average"].n_averaged) == 12


@pytest.fixture
def quick_compiler(monkeypatch):
    """The examples' ``torch.compile`` with a compiler that stops before the minute of C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


# Dynamo looks at the .grad of every tensor that lives across a break of the graph.
LOOKS_AT_GRAD = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_model_and_a_compiled_step():
    """A step baked into a graph refreshes always or never, and moves with the rate of its first call."""
    model = GPT(layers=1)
    _, steps = run(
        "torch.md", "A compiled model and a compiled step", model=model, batches=pairs(96, batch_size=4)
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}


class Counting:
    """A compiler that counts the graphs with arithmetic in them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += any(
            node.op == "call_function" and "foreach" in str(node.target) for node in graph.graph.nodes
        )
        return graph.forward


@LOOKS_AT_GRAD
@pytest.mark.parametrize(("fraction", "micro_batches"), [(1.0, 1), (0.5, 1), (0.125, 1), (0.5, 2)])
@pytest.mark.parametrize("in_place", [False, True])
def test_no_graph_is_compiled_after_the_first_refresh(fraction, micro_batches, in_place):
    """A part of the rows is another shape: each refresh would compile the model again, a minute each time."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = GPT(layers=1)
    if in_place:
        model.compile(backend=compiler)
    else:
        model = torch.compile(model, backend=compiler)
    opt = Sophia(model, lr=1e-3, update_every=2, fraction=fraction)
    made = []
    with watching() as steps:
        for number in range(7):
            for part in range(micro_batches):
                model(*data(8, seed=10 * number + part))[1].backward()
            opt.step()
            opt.zero_grad()
            made.append(len(graphs))
    torch._dynamo.reset()
    assert refreshed(steps) == [0, 2, 4, 6]
    assert made[0] > 0, "the model was not compiled at all"
    assert made == made[:1] * 7


class Small(nn.Module):
    """Three parameters: tracing a step takes a time in proportion to their number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, x):
        return self.head(self.tokens(x))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def loop(model, opt, compiler, *, whole):
    if whole:

        def body(x, y):
            loss_of(model, x, y).backward()
            opt.step()
            opt.zero_grad()

        return torch.compile(body, backend=compiler)
    step = torch.compile(opt.step, backend=compiler)

    def body(x, y):
        loss_of(model, x, y).backward()
        step()
        opt.zero_grad()

    return body


SCHEDULES = {
    "linear": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5),
    "one cycle, momentum too": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=14),
}


@LOOKS_AT_GRAD
@pytest.mark.parametrize(
    ("schedule", "tensor_lr", "whole", "rule"),
    [
        ("linear", False, False, "paper"),
        ("linear", True, False, "paper"),
        ("one cycle, momentum too", False, True, "paper"),
        ("linear", True, False, "damped"),
    ],
)
def test_a_compiled_step_is_the_step(schedule, tensor_lr, whole, rule):
    """Traced whole, every parameter would get the state of one of them; and each new rate another graph."""
    torch._dynamo.reset()
    compiler, results = Counting(), []
    for compiled in (False, True):
        model = Small()
        # eps is large, so that no coordinate is clipped: a sign of a sum that rounds to zero may differ.
        opt = Sophia(model, lr=torch.tensor(1e-3) if tensor_lr else 1e-3, eps=1.0, rule=rule)
        scheduler = SCHEDULES[schedule](opt)
        body = loop(model, opt, compiler, whole=whole) if compiled else loop(model, opt, "eager", whole=False)
        with torch.compiler.set_stance("default" if compiled else "force_eager"), watching() as steps:
            for number in range(12):
                body(*data(4, seed=number))
                scheduler.step()
        assert refreshed(steps) == [0, 10]
        results.append([t.detach() for p in model.parameters() for t in (p, *opt.state[p].values())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)
    # Far fewer than the 12 rates; torch 2.6 takes one more than later ones until all of them are one graph.
    assert compiler.graphs in ([1, 2, 3, 4] if rule == "paper" else [0])


ALL_SCHEDULES = {
    **SCHEDULES,
    "from zero": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: step / 12),
    "cosine after warm-up": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 9)], [3]
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "swa": lambda opt: swa_utils.SWALR(opt, swa_lr=1e-4, anneal_epochs=4),
}


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_no_schedule_moves_the_refreshes(schedule):
    """A refresh tied to the scheduler's counter, or skipped at a rate of zero."""
    model = GPT(layers=1)
    opt = Sophia(model, lr=1e-3, update_every=4)
    scheduler = ALL_SCHEDULES[schedule](opt)
    with watching() as steps:
        for number in range(10):
            loss = model(*data(4, seed=number))[1]
            loss.backward()
            opt.step()
            opt.zero_grad()
            scheduler.step(*([loss.detach()] if schedule == "plateau" else []))
    assert refreshed(steps) == [0, 4, 8]
    assert len({taken.lr for taken in steps}) > 2


class Normed(nn.Module):
    """Logits after a BatchNorm, whose statistics ``update_bn`` makes anew."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.norm(self.inner(x)))


def test_averaged_models_and_their_statistics_are_not_recorded():
    """The copy's training forwards would be replayed as if they were the model's."""
    model = Normed()
    opt = Sophia(model, lr=1e-2, update_every=2)
    average = swa_utils.AveragedModel(model)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    with watching() as steps:
        for _ in range(5):
            nn.functional.cross_entropy(model(x), y).backward()
            average.update_parameters(model)
            swa_utils.update_bn([x, x], average)
            # The batch statistics make the rows dependent, which is said once.
            with (
                nullcontext()
                if opt.stats()["refreshes"]
                else pytest.warns(SophiaWarning, match="independent")
            ):
                opt.step()
            opt.zero_grad()
    assert refreshed(steps) == [0, 2, 4]
    assert {taken.counted for taken in steps} == {8.0}


def test_an_optimizer_for_each_parameter_in_the_backward_is_refused():
    """It would refresh once a parameter, on a model that is half updated, in the middle of a backward."""
    model = GPT(layers=1)
    optimizers = {p: Sophia([p], model=model, lr=1e-3) for p in model.parameters()}

    def hook(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"an optimizer in the backward\?.*call step\(\) after the backward"
    ):
        model(*data(4))[1].backward()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def replica(module):
    """As ``torch.nn.parallel.replicate`` makes one for each device: without parameters of its own."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, p in module._parameters.items():
        setattr(made, name, None if p is None else p * 1)
    return made


@pytest.mark.parametrize("given", [True, False], ids=["model", "parameters"])
def test_copies_inside_data_parallel_are_refused(given):
    """Their inputs lie on other devices, and each would be taken for the whole batch."""
    model = GPT(layers=1)
    opt = Sophia(model if given else model.parameters())
    with pytest.raises(RuntimeError, match=r"GPT runs inside torch\.nn\.DataParallel.*one process a device"):
        replica(model)(*data(4))
    assert not opt.state
    assert replica(model.eval())(*data(4))[1].requires_grad


def test_data_parallel_over_one_device_is_the_module():
    """What it is on a machine without GPUs: a wrapper that passes the call on."""
    model = GPT(layers=1)
    wrapped = nn.DataParallel(model)
    opt = Sophia(wrapped)
    with watching() as steps:
        wrapped(*data(4))[1].backward()
        opt.step()
    assert refreshed(steps) == [0]
