"""One curvature, whatever the layout: 1 x 16 == 4 x 4 == 2 ranks x 8 == 4 ranks x 4, for the same labels,
with padding.
"""

import layouts
import pytest
import teams
import torch
from layouts import report, sophia
from torch.nn.parallel import DistributedDataParallel

from tiny import GPT, LabelsFromLogits

DDP = {
    "default": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "find unused": {"find_unused_parameters": True},
}
SHARDED = {
    "reshard": ("sharded", {}, 1e-5),
    "no reshard": ("sharded", {"reshard": False}, 1e-5),
    "checkpointed": ("sharded", {"model": {"checkpoint": "nonreentrant"}}, 1e-5),
    "checkpointed, bf16": ("sharded", {"model": {"checkpoint": "nonreentrant"}, "half": True}, 2e-2),
}


def over_ddp(settings, order, accumulate):
    if order == "before":
        model = GPT()
        opt = sophia(model)
        wrapped = DistributedDataParallel(model, **settings)
    else:
        wrapped = DistributedDataParallel(GPT(), **settings)
        opt = sophia(wrapped)
    return report(wrapped, opt, accumulate=accumulate)


def check(results, tolerance=1e-5):
    for result in results:
        assert result["error"] < tolerance
        assert result["B"] == result["true_B"]
        assert result["untouched"]
        assert result["equal"]
        assert result["refreshes"] == 2


@pytest.mark.parametrize("accumulate", [False, True], ids=["2x8", "2x2x4"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("variant", DDP)
def test_ddp(variant, order, accumulate):
    """Squares averaged over ranks, B of one rank, or a bucket that the replay writes into."""
    if accumulate and variant == "static graph":
        pytest.skip("DDP(static_graph=True) itself refuses no_sync() in the first step, with any optimizer")
    check(teams.run(2, over_ddp, settings=DDP[variant], order=order, accumulate=accumulate))


def over_shards(kind, settings, order="after", accumulate=False, prepare=None):
    settings = dict(settings)
    likelihood = LabelsFromLogits()
    if settings.pop("half", False):
        settings["policy"], likelihood = layouts.half_precision(), layouts.OneLabel()
    if order == "before":
        # Wrapping replaces the parameters: an optimizer built before has to be pointed at the new ones.
        torch.manual_seed(0)
        model = GPT()
        opt = sophia(model)
        layouts.wrap(model, kind, **settings)
        for group, matrices in zip(opt.param_groups, (True, False), strict=True):
            group["params"] = [p for p in model.parameters() if (p.ndim >= 2) == matrices]
    else:
        model = getattr(layouts, kind)(**settings)
        if prepare is not None:
            prepare(model)
        opt = sophia(model, likelihood=likelihood)
    result = report(model, opt, accumulate=accumulate)
    result["sharded"] = all(
        type(t) is type(p) is not torch.Tensor and t.placements == p.placements
        for p in model.parameters()
        for t in [opt.state[p]["hessian"].data]
        for p in [p.data]
    )
    return result


@pytest.mark.parametrize("accumulate", [False, True], ids=["2x8", "2x2x4"])
@pytest.mark.parametrize("variant", SHARDED)
def test_fully_shard(variant, accumulate):
    """The wrapper's mean taken for a sum, gradients that wait unreduced taken for the pass's, or state that
    is whole.
    """
    kind, settings, tolerance = SHARDED[variant]
    results = teams.run(2, over_shards, kind=kind, settings=settings, accumulate=accumulate)
    check(results, tolerance)
    assert all(result["sharded"] for result in results)


def test_fully_shard_after_sophia_with_parameters_pointed_anew():
    """Trainers that build the optimizer first and swap its parameters for the shards."""
    check(teams.run(2, over_shards, kind="sharded", settings={}, order="before"))


@pytest.mark.parametrize("accumulate", [False, True], ids=["4x4", "4x2x2"])
def test_hybrid_shards_on_four_ranks(accumulate):
    """A 2-D mesh: divided by the shards alone, or counted over one replica."""
    check(teams.run(4, over_shards, kind="hybrid", settings={}, accumulate=accumulate))


def sum_instead_of_mean(model):
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@pytest.mark.parametrize(("size", "kind"), [(2, "sharded"), (4, "hybrid")])
def test_gradient_divide_factor_is_read(size, kind):
    """Divided by a factor of the user's own, h would be wrong by its square."""
    check(teams.run(size, over_shards, kind=kind, settings={}, prepare=sum_instead_of_mean))


def over_flat(settings):
    model = layouts.flat(**settings)
    return report(model, sophia(model), whole=layouts.whole_of_flat(model))


def test_fsdp1_coordinate_by_coordinate():
    """Flattened shards: the right sum in the wrong places, or a mean."""
    check(teams.run(2, over_flat, settings={"use_orig_params": True}))


def decays_of_flat():
    model = layouts.flat(use_orig_params=True)
    opt = sophia(model)
    names = {id(p): layouts.clean(n) for n, p in model.named_parameters()}
    return {names[id(p)]: g["weight_decay"] for g in opt.param_groups for p in g["params"]}


def test_fsdp1_decays_the_same_parameters():
    """Its parameters are flattened: all would count as vectors, and nothing be decayed, in silence."""
    reference = GPT()
    expected = {
        name: 0.1 if p.ndim >= 2 else 0.0 for name, p in reference.named_parameters() if p.requires_grad
    }
    for found in teams.run(2, decays_of_flat):
        assert found == expected
