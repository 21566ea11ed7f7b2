"""bfloat16 state on several processes: replicas round alike, and shards as the whole would."""

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from reference import Given, noise_like
from sophia import Sophia
from tiny import GPT, data

SHAPES = ((13, 6), (5,), (4, 3, 2), (1, 8))
PLACEMENTS = {
    "rows": lambda: (init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)]),
    "rows, in replicas": lambda: (
        init_device_mesh("cpu", (dist.get_world_size() // 2, 2)),
        [Replicate(), Shard(0)],
    ),
    "rows of rows": lambda: (init_device_mesh("cpu", (2, dist.get_world_size() // 2)), [Shard(0), Shard(0)]),
}


def trained(make):
    """Three steps with given gradients and curvature; returns whole tensors."""
    params = [nn.Parameter(make(noise_like([torch.empty(s)], i)[0].bfloat16())) for i, s in enumerate(SHAPES)]
    estimator = Given(lambda p: make(torch.linspace(0, 3, p.numel()).view(p.shape)))
    opt = Sophia(
        params,
        model=nn.ParameterList(params),
        mode="manual",
        estimator=estimator,
        state_dtype=torch.bfloat16,
        stochastic_rounding=True,
        process_group=False,
        lr=0.01,
    )
    for step in range(3):
        with opt.hessian_pass():
            pass
        for i, p in enumerate(params):
            p.grad = make(noise_like([torch.empty(SHAPES[i])], 10 * step + i)[0].bfloat16())
        opt.step()
    return [layouts.plain(t).detach().clone() for p in params for t in (p, *opt.state[p].values())]


def sharded_and_whole(placement):
    mesh, placements = PLACEMENTS[placement]()
    shards = trained(lambda t: distribute_tensor(t, mesh, placements))
    whole = trained(lambda t: t)
    return [torch.equal(a, b) for a, b in zip(shards, whole, strict=True)]


@pytest.mark.parametrize(
    ("size", "placement"), [(2, "rows"), (4, "rows"), (4, "rows, in replicas"), (4, "rows of rows")]
)
def test_shards_round_as_the_whole(size, placement):
    """Resumed on another number of ranks the run would be another one; replicas of a shard would part."""
    for result in teams.run(size, sharded_and_whole, placement=placement):
        assert all(result)


def columns():
    """A layout in which a shard is not one piece of the whole: the noise only has to be noise."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards = trained(lambda t: distribute_tensor(t, mesh, [Shard(t.ndim - 1)]))
    return max(
        float((a.float() - b.float()).abs().max()) for a, b in zip(shards, trained(lambda t: t), strict=True)
    )


def test_shards_by_columns_stay_near_the_whole():
    """A wrong offset must not become a wrong number."""
    assert max(teams.run(2, columns)) < 0.05


def replicas():
    model = nn.parallel.DistributedDataParallel(GPT(layers=1).to(torch.bfloat16))
    opt = Sophia(model, lr=1e-3, update_every=2, state_dtype=torch.bfloat16, stochastic_rounding=True)
    x, y = data(8)
    mine = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    for _ in range(3):
        opt.zero_grad()
        model(x[mine], y[mine])[1].backward()
        opt.step()
    return [t.clone() for p in model.parameters() for t in (p.detach(), *opt.state[p].values())]


def test_replicas_stay_equal():
    """Noise of the rank in a rounding: replicas that drift apart, and nothing in the training notices."""
    one, two = teams.run(2, replicas)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
