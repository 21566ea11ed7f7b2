"""``Sophia(model.parameters())`` on several ranks: the module that each wrapper leads to, and an error on all
where one rank has called none.
"""

import re

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
from layouts import report
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from tiny import GPT, LabelsFromLogits, data

SETTINGS = {"likelihood": LabelsFromLogits(), "fraction": 1.0, "update_every": 2}


def found(layout, order):
    """Train with an optimizer that was given parameters alone."""
    torch.manual_seed(0)
    if layout == "ddp":
        inner = GPT()
        if order == "before":
            opt = Sophia(inner.parameters(), **SETTINGS)
            model = DistributedDataParallel(inner)
        else:
            model = DistributedDataParallel(inner)
            opt = Sophia(model.parameters(), **SETTINGS)
    elif layout == "sharded":
        model = inner = GPT()
        if order == "before":
            # As accelerate does it: shards in the optimizer's groups, in the place of what they are of.
            opt = Sophia(model.parameters(), **SETTINGS)
            names = {id(p): name for name, p in model.named_parameters()}
            layouts.wrap(model, "sharded")
            shards = dict(model.named_parameters())
            for group in opt.param_groups:
                group["params"] = [shards[names[id(p)]] for p in group["params"]]
        else:
            layouts.wrap(model, "sharded")
            opt = Sophia(model.parameters(), **SETTINGS)
    else:
        model = inner = layouts.flat(use_orig_params=True)
        opt = Sophia(model.parameters(), **SETTINGS)
    x, y, _ = layouts.share()
    model(x, y)
    assert opt._model is inner
    whole = layouts.whole_of_flat(model) if layout == "flat" else None
    result = report(model, opt, accumulate=False, whole=whole)
    for module in model.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if "sophia" in type(hook).__module__]
        assert len(hooks) == (module is inner)
    return result


@pytest.mark.parametrize(
    ("layout", "order"),
    [("ddp", "before"), ("ddp", "after"), ("sharded", "before"), ("sharded", "after"), ("flat", "after")],
)
def test_the_curvature_is_that_of_one_process(layout, order):
    """The sum over the ranks lost with the wrapper, or shards taken for strangers inside the forward."""
    for result in teams.run(2, found, layout=layout, order=order):
        assert result["error"] < 1e-5
        assert result["B"] == result["true_B"]
        assert result["untouched"]
        assert result["equal"]


def one_rank_calls_nothing(wrapped):
    model = GPT()
    call = DistributedDataParallel(model) if wrapped else model
    opt = Sophia(call.parameters(), **SETTINGS)
    if dist.get_rank() == 0:
        model(*data(4))[1].backward()
    else:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    opt.step()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rank_without_a_forward_ends_all(wrapped):
    """A rank that has no module to ask raises alone, and the others wait."""
    (kind0, text0), (kind1, text1) = teams.failures(2, one_rank_calls_nothing, wrapped=wrapped)
    assert (kind0, kind1) == ("raised", "raised")
    assert "the Hessian pass failed on rank 1, so this rank stops too" in text0
    assert re.search(r"no module that owns the parameters \((DistributedDataParallel, )?GPT\) ran", text1)
