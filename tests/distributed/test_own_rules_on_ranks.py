"""The damped rule on shards takes the steps of one process; what needs whole matrices is refused on them."""

import layouts
import pytest
import teams
import torch
from layouts import plain, sophia
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from tiny import GPT


def tensor_parallel():
    """Each matrix of a block's feed-forward part cut along another side; the rest is plain tensors."""
    model = GPT()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        first, second = [name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)][-2:]
        parallelize_module(block, mesh, {first: ColwiseParallel(), second: RowwiseParallel()})
    return model


def trained(layout, steps=4, **settings):
    """Parameters by name, and sizes in the state, after steps whose h does not hang on sampled labels."""
    model = {
        "alone": GPT,
        "ddp": lambda: DistributedDataParallel(GPT()),
        "shards": layouts.sharded,
        "hybrid": layouts.hybrid,
        "tensor parallel": tensor_parallel,
    }[layout]()
    if layout == "tensor parallel":
        settings["process_group"] = False  # all ranks see the same batch
    opt = sophia(model, rule="damped", lr=1e-3, estimator="empirical_fisher", **settings)
    x, y, _ = layouts.share(padded=False) if layout != "tensor parallel" else (*layouts.data(16), None)
    for _ in range(steps):
        opt.zero_grad()
        model(x, y)[1].backward()
        opt.step()
    named = [(layouts.clean(name), p) for name, p in model.named_parameters()]
    return (
        {name: plain(p).detach().clone() for name, p in named},
        {name: float(opt.state[p]["momentum_rms"]) for name, p in named},
    )


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, "ddp"), (2, "shards"), (4, "shards"), (4, "hybrid"), (2, "tensor parallel")]
)
def test_the_steps_of_one_process(ranks, layout, steps):
    """A floor by the rms of a shard: a rank that holds rare tokens alone would move them as far as frequent
    ones. The first step has no step before it to take the size from.
    """
    ((expected, sizes),) = teams.run(1, trained, layout="alone", steps=steps)
    start = {name: p.detach() for name, p in GPT().named_parameters()}
    for found, found_sizes in teams.run(ranks, trained, layout=layout, steps=steps):
        for name, value in expected.items():
            moved = float((value - start[name]).norm())
            assert float((found[name] - value).norm()) < 2e-3 * moved, name
            assert found_sizes[name] == pytest.approx(sizes[name], rel=1e-4), name


def test_half_of_the_state_on_shards_too():
    for found, sizes in teams.run(2, trained, layout="shards", state_dtype=torch.bfloat16):
        assert all(value.isfinite().all() for value in found.values())
        assert all(size > 0 for size in sizes.values())


def refused(kind, rule):
    model = layouts.sharded() if kind == "shards" else layouts.flat(use_orig_params=True)
    opt = Sophia(model, rule=rule)
    x, y, _ = layouts.share()
    before = layouts.bits(model.parameters())
    model(x, y)[1].backward()
    with pytest.raises(RuntimeError) as error:
        opt.step()
    return str(error.value), layouts.same_bits(before, layouts.bits(model.parameters()))


@pytest.mark.parametrize(
    ("kind", "rule", "words"),
    [
        ("shards", "spectral", "singular values of whole matrices"),
        ("flat", "damped", "FSDP1 has flattened"),
        ("flat", "spectral", "FSDP1 has flattened"),
    ],
)
def test_refused_before_anything_moves(kind, rule, words):
    for message, still in teams.run(2, refused, kind=kind, rule=rule):
        assert words in message
        assert "rule='paper'" in message
        assert still
