"""One curvature, whatever the layout: 1 x 16 == 4 x 4 == 2 ranks x 8 == 4 ranks x 4, for the same labels,
with padding.
"""

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
from layouts import report, sophia
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from sophia.refresh.replay import _drawn
from tiny import GPT, LabelsFromLogits, data

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
        settings["policy"], likelihood = layouts.half_precision(), layouts.OnePair()
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
    result = report(model, opt, accumulate=accumulate, summed=prepare is sum_instead_of_mean)
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


def over_flat(strategy, accumulate):
    settings = {"use_orig_params": True, "sharding_strategy": ShardingStrategy[strategy]}
    if strategy == "HYBRID_SHARD":
        settings["device_mesh"] = init_device_mesh("cpu", (2, 2))
    model = layouts.flat(**settings)
    return report(model, sophia(model), accumulate=accumulate, whole=layouts.whole_of_flat(model))


@pytest.mark.parametrize("accumulate", [False, True], ids=["at once", "accumulated"])
@pytest.mark.parametrize(
    ("size", "strategy"), [(2, "FULL_SHARD"), (2, "SHARD_GRAD_OP"), (4, "HYBRID_SHARD")], ids=lambda v: str(v)
)
def test_fsdp1_coordinate_by_coordinate(size, strategy, accumulate):
    """Flattened shards: the right sum in the wrong places, or a mean."""
    check(teams.run(size, over_flat, strategy=strategy, accumulate=accumulate))


def over_other(kind):
    model = GPT()
    if kind == "replicate of DDP":
        replicate(model)
    elif kind == "replicate of FSDP2":
        from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_shards

        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("replicas",))
        for part in (*model.blocks, model):
            replicate_shards(part, mesh=mesh)
    elif kind == "offloaded":
        for part in (*model.blocks, model):
            fully_shard(part, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "compiled DDP":
        model = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    elif kind == "compiled blocks, sharded":
        for block in model.blocks:
            block.compile(backend="aot_eager")
        layouts.wrap(model, "sharded")
    return report(model, sophia(model))


OTHERS = [
    "replicate of DDP",
    "replicate of FSDP2",
    "offloaded",
    "compiled DDP",
    "compiled blocks, sharded",
]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_wrappers(kind):
    """A wrapper that is not recognised, and its mean taken for a sum."""
    if kind == "replicate of FSDP2":
        pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    check(teams.run(2, over_other, kind=kind))


class Narrow(torch.nn.Module):
    """Fewer rows than ranks in some parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(8, 3), torch.nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.embed(x))


def empty_shards():
    x = torch.arange(8)

    def trained(model, x, **settings):
        opt = sophia(model, lr=1e-2, **settings)
        for _ in range(3):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), x % 5).backward()
            opt.step()
        return [layouts.plain(p).detach() for p in model.parameters()]

    rank = dist.get_rank()
    model = fully_shard(Narrow())
    together = trained(model, x[2 * rank : 2 * rank + 2])
    alone = trained(Narrow(), x, process_group=False)
    smallest = min(p.to_local().numel() for p in model.parameters())
    return max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)), smallest


def test_ranks_with_empty_shards():
    """A kernel or a check that expects something to be there."""
    results = teams.run(4, empty_shards)
    assert min(smallest for _, smallest in results) == 0
    assert all(difference < 1e-6 for difference, _ in results)


def half_of_the_rows():
    model = DistributedDataParallel(GPT())
    opt = Sophia(model, update_every=1, fraction=0.5)
    x, y = data(16, padded=True)
    rows = slice(0, 6) if dist.get_rank() == 0 else slice(6, 16)
    counts = []
    for _ in range(2):
        opt.zero_grad()
        model(x[rows], y[rows])[1].backward()
        opt.step()
        counts.append(opt.stats()["B"])
    expected = []
    for step in range(2):
        halves = [
            torch.arange(16)[own][_drawn([True] * n, n // 2, (0, step, rank, 0, "rows"))[0]]
            for rank, (own, n) in enumerate([(slice(0, 6), 6), (slice(6, 16), 10)])
        ]
        expected.append(float((y[torch.cat(halves)] >= 0).sum()))
    return counts == expected, layouts.equal_on_all_ranks(model.parameters())


def test_a_fraction_of_unequal_batches():
    """Each rank takes half of its own rows; B is what all took together."""
    assert teams.run(2, half_of_the_rows) == [(True, True)] * 2


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
