"""A refresh must not spend the user's recompilations."""

import pytest
import torch
from torch.nn import functional as F

from sophia import Sophia
from tiny import Bare, LabelsFromLogits, data


def train(lengths, *, optimizer, compiled="in place", **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model, (x, y) = Bare(layers=1), data(8)
    opt = optimizer(model)
    if compiled == "in place":
        model.compile(backend="aot_eager", **options)
    elif compiled == "its parts":
        for block in model.blocks:
            block.compile(backend="aot_eager", **options)
    called = torch.compile(model, backend="aot_eager", **options) if compiled == "around" else model
    for length in lengths:
        opt.zero_grad()
        logits = called(x[:, :length])
        F.cross_entropy(logits.flatten(0, 1), y[:, :length].flatten()).backward()
        opt.step()
    return opt, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def sophia(model):
    return Sophia(model, update_every=1, lr=1e-3, likelihood=LabelsFromLogits())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("options", [{"dynamic": False, "fullgraph": True}, {}], ids=["static", "default"])
@pytest.mark.parametrize("compiled", ["in place", "its parts", "around"])
def test_as_many_graphs_as_under_adamw(compiled, options):
    """One graph more for each length: at the limit of eight the user's own forward raised (fullgraph), or ran
    uncompiled from there on.
    """
    lengths = (6, 7, 8, 9, 10, 11)
    _, expected = train(
        lengths, optimizer=lambda m: torch.optim.AdamW(m.parameters()), compiled=compiled, **options
    )
    opt, found = train(lengths, optimizer=sophia, compiled=compiled, **options)
    assert found == expected
    assert opt.stats()["refreshes"] == len(lengths)
    assert opt.stats()["B"] == lengths[-1]  # one row of eight


def test_h_is_that_of_the_uncompiled_model():
    """The part that runs outside of the graph is the same function."""
    states = []
    for compiled in ("in place", None):
        opt, _ = train((9, 9), optimizer=sophia, compiled=compiled, fullgraph=True)
        states.append([s["hessian"] for s in opt.state.values()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_the_user_s_stance_is_as_before():
    """Who asks to be told of recompilations must still be told after a refresh."""
    model, (x, y) = Bare(layers=1), data(8)
    opt = sophia(model)
    torch._dynamo.reset()
    model.compile(backend="aot_eager", dynamic=False)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        opt.step()
        with pytest.raises(RuntimeError, match="recompile"):
            model(x[:, :5])
    torch._dynamo.reset()
