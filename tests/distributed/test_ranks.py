"""Who is summed with whom: process groups, tensor-parallel meshes, estimators, noise, passes by hand,
statistics.
"""

import gc

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
from layouts import bits, compare, equal_on_all_ranks, plain, same_bits, share, sophia
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from sophia.curvature import EmpiricalFisher, Hutchinson
from sophia.distributed.shards import local
from tiny import GPT, data, estimate_in_state, relative_error


def first_step(model, opt, x, y, means=2):
    opt.zero_grad()
    model(x, y)[1].backward()
    opt.step()
    return compare(model, opt, means=means)[0], opt.stats()["B"]


# ---- process groups ----


def with_group(choice):
    """Two of four ranks train together: each pair has the whole batch between them."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, place = pairs[rank // 2], rank % 2
    x, y = data(layouts.ROWS, padded=True)
    x, y = x[place * 8 : place * 8 + 8], y[place * 8 : place * 8 + 8]
    if choice == "given":
        model = GPT()
        return first_step(model, sophia(model, process_group=mine), x, y)
    if choice == "of the wrapper":
        model = DistributedDataParallel(GPT(), process_group=mine)
        return first_step(model, sophia(model), x, y)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("run", "data"))["data"]
    if choice == "a mesh":
        model = GPT()
        return first_step(model, sophia(model, process_group=mesh), x, y)
    model = layouts.sharded(mesh)
    return first_step(model, sophia(model), x, y)


@pytest.mark.parametrize("choice", ["given", "of the wrapper", "a mesh", "of the shards"])
def test_part_of_the_ranks(choice):
    """Two runs side by side whose curvatures are added up."""
    for error, count in teams.run(4, with_group, choice=choice):
        assert error < 1e-5
        assert count == 191


def alone():
    """Replicas that train different models on different data under one process group."""
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    opt = Sophia(model, process_group=False, fraction=1.0)
    count = 3 + dist.get_rank()
    torch.nn.functional.cross_entropy(model(torch.arange(count)), torch.arange(count)).backward()
    opt.step()
    return opt.stats()["B"]


def test_independent_replicas():
    """process_group=False that still counts, or waits for, the other replicas."""
    assert teams.run(2, alone) == [3.0, 4.0]


# ---- tensors that are split ----


def tensor_parallel(mesh):
    model = GPT()
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def over_tensors():
    model = tensor_parallel(init_device_mesh("cpu", (2,)))
    x, y = data(layouts.ROWS, padded=True)
    opt = sophia(model, process_group=False)
    error, count = first_step(model, opt, x, y, means=1)
    for _ in range(2):
        opt.zero_grad()
        model(x, y)[1].backward()
        opt.step()
    return error, count, equal_on_all_ranks(model.parameters())


def test_tensor_parallel_ranks_see_one_batch():
    """The same predictions counted once a tensor-parallel rank, or labels that differ between them."""
    for error, count, equal in teams.run(2, over_tensors):
        assert error < 1e-5
        assert count == 191
        assert equal


def over_tensors_and_replicas():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = tensor_parallel(mesh["tensor"])
    opt = sophia(model, process_group=mesh["data"])
    x, y = data(layouts.ROWS, padded=True)
    place = slice(0, 8) if dist.get_rank() < 2 else slice(8, 16)
    return first_step(model, opt, x[place], y[place])


def test_tensor_parallel_replicas():
    """Shards of tensors summed over the tensor-parallel ranks, or not summed over the others."""
    for error, count in teams.run(4, over_tensors_and_replicas):
        assert error < 1e-5
        assert count == 191


def over_tensors_and_shards():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = tensor_parallel(mesh["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    opt = sophia(model)
    x, y = data(layouts.ROWS, padded=True)
    place = slice(0, 8) if dist.get_rank() < 2 else slice(8, 16)
    error, count = first_step(model, opt, x[place], y[place])
    return error, count, opt._refresher.ranks(opt._model, opt._parameters()).number


def test_tensor_parallel_under_fully_shard():
    """The data-parallel ranks are read from the mesh: others would be counted, or draw noise, twice."""
    results = teams.run(4, over_tensors_and_shards)
    for error, count, _ in results:
        assert error < 1e-5
        assert count == 191
    assert [number for _, _, number in results] == [0, 0, 1, 1]


# ---- what happens to .grad ----


def clipped_and_divided(kind, divisor):
    """A host that divides by the number of tokens, and a loop that clips."""
    x, y, _ = share()
    model = layouts.sharded() if kind == "shards" else DistributedDataParallel(GPT())
    opt = sophia(model)
    (model(x, y)[1] * divisor).backward()
    for p in model.parameters():
        p.grad.div_(divisor)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()
    return float(plain(norm)), opt.stats()["gradient_scale"], compare(model, opt, means=2)[0]


@pytest.mark.parametrize("divisor", [1.0, 500.0])
@pytest.mark.parametrize("kind", ["ddp", "shards"])
def test_the_scale_of_gradients_on_ranks(kind, divisor):
    """Measured against the gradients of this rank alone, before the wrapper had reduced them: no factor."""
    for norm, scale, error in teams.run(2, clipped_and_divided, kind=kind, divisor=divisor):
        assert scale == pytest.approx(0.1 / norm, rel=1e-3)
        assert error < 1e-5


# ---- estimators ----


def estimator_of(name, labels):
    if name == "gnb":
        return "gnb"
    return {"hutchinson": Hutchinson, "fisher": EmpiricalFisher}[name](
        loss_fn=lambda output, args, kwargs: mean_loss(output[0], labels)
    )


def mean_loss(logits, labels):
    """NaN where there is nothing to average, as torch's."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def estimate_alone(name, x, y):
    model = GPT()
    opt = sophia(model, estimator=estimator_of(name, y), process_group=False)
    model(x, y)[1].backward()
    opt.step()
    return {name: estimate_in_state(opt)[p] for name, p in model.named_parameters()}


def estimate_together(name, layout, empty):
    x, y = data(layouts.ROWS, padded=True)
    if empty:
        y[8:] = -1
    place = slice(dist.get_rank() * 8, dist.get_rank() * 8 + 8)
    model = DistributedDataParallel(GPT()) if layout == "ddp" else layouts.sharded()
    opt = sophia(model, estimator=estimator_of(name, y[place]))
    # The model's own loss is NaN on a rank without a counted token: the loop divides by the count of all.
    layouts.local_loss(model, x[place], y[place]).backward()
    opt.step()
    found = {layouts.clean(n): plain(estimate_in_state(opt)[p]) for n, p in model.named_parameters()}
    expected = estimate_alone(name, x, y)
    return relative_error(found, expected), opt.stats()["B"] == float((y >= 0).sum())


@pytest.mark.parametrize("empty", [False, True], ids=["both ranks", "one rank has no counted token"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("gnb", "ddp"), ("hutchinson", "ddp"), ("fisher", "ddp"), ("gnb", "shards"), ("fisher", "shards")],
)
def test_estimators_equal_one_process(name, layout, empty):
    """Hutchinson's probe that differs between replicas; a rank that leaves the others waiting as it has
    nothing to do.
    """
    # Hutchinson too: one probe on all ranks and in one process, so these are the same numbers, not averages.
    for error, counted in teams.run(2, estimate_together, name=name, layout=layout, empty=empty):
        assert error < 1e-5
        assert counted


def noise(layout):
    if layout == "ddp":
        model = DistributedDataParallel(GPT())
    elif layout == "shards":
        model = layouts.sharded()
    else:
        model = layouts.hybrid()
    drawn = []
    opt = Sophia(model, fraction=1.0, update_every=1)

    class Listening(type(opt.likelihood)):
        def draw(self, probabilities, uniforms):
            drawn.append(uniforms.clone())
            return super().draw(probabilities, uniforms)

    opt.likelihood.__class__ = Listening
    x, y = data(4)
    for _ in range(2):
        opt.zero_grad()
        model(x, y)[1].backward()
        opt.step()
    return [u.flatten().tolist() for u in drawn]


@pytest.mark.parametrize(("size", "layout"), [(2, "ddp"), (2, "shards"), (4, "hybrid")])
def test_ranks_draw_different_noise(size, layout):
    """The same noise on all ranks (as in the official script): the estimate of one rank, world times as
    noisy.
    """
    draws = teams.run(size, noise, layout=layout)
    streams = [tuple(u) for rank in draws for u in rank]
    assert len(streams) == 2 * size
    assert len({number for stream in streams for number in stream}) == sum(map(len, streams))


# ---- by hand ----


def by_hand(layout, sync):
    x, y, _ = share()
    model = layouts.sharded() if layout == "shards" else DistributedDataParallel(GPT(), **layout)
    opt = sophia(model, mode="manual")
    for _ in range(3):  # DDP lays out its buckets anew in the second iteration; from then on they stay
        opt.zero_grad(set_to_none=False)
        model(x, y)[1].backward()
    before = bits(p.grad for p in model.parameters())
    with opt.hessian_pass() as hp:
        with layouts.without_sync(model) if not sync else layouts.nullcontext():
            hp.sampled_loss(model(x[:4])[0], y[:4] >= 0).backward()
        hp.sampled_loss(model(x[4:])[0], y[4:] >= 0).backward()
    untouched = same_bits(before, bits(p.grad for p in model.parameters()))
    error, _ = compare(model, opt)
    return error, opt.stats()["B"], untouched


def by_hand_while_accumulating():
    x, y, _ = share()
    model = layouts.sharded()
    opt = sophia(model, mode="manual")
    model.set_requires_gradient_sync(False)  # as a loop does before its next micro-batches
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(x)[0], y >= 0).backward()
    with layouts.without_sync(model):
        (model(x[:4], y[:4])[1] / 2).backward()
    (model(x[4:], y[4:])[1] / 2).backward()
    after = bits(p.grad for p in model.parameters())
    opt.zero_grad()
    with layouts.without_sync(model):
        (model(x[:4], y[:4])[1] / 2).backward()
    (model(x[4:], y[4:])[1] / 2).backward()
    return compare(model, opt)[0], same_bits(after, bits(p.grad for p in model.parameters()))


def test_pass_by_hand_before_accumulation():
    """Gradients of the pass that wait unreduced, are missing in h and turn up in the training gradients."""
    for error, clean in teams.run(2, by_hand_while_accumulating):
        assert error < 1e-5
        assert clean


@pytest.mark.parametrize("sync", [True, False], ids=["synchronised", "accumulated"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, "shards"],
    ids=["ddp", "bucket view", "find unused", "shards"],
)
def test_pass_by_hand_through_the_wrapper(layout, sync):
    """A mean that is summed again, B of one rank, or training gradients overwritten in their buckets."""
    for error, count, untouched in teams.run(2, by_hand, layout=layout, sync=sync):
        assert error < 1e-5
        assert count == 191
        assert untouched


# ---- statistics ----


def statistics(kind):
    x, y, _ = share()
    model = layouts.sharded() if kind == "shards" else DistributedDataParallel(GPT())
    opt = sophia(model)
    for _ in range(2):
        opt.zero_grad()
        model(x, y)[1].backward()
        opt.step()
    everything = opt.stats(all_ranks=True)
    if dist.get_rank() == 0:
        opt.stats()  # on one rank: must not wait
    whole = {p: {k: plain(v) for k, v in opt.state[p].items()} for p in model.parameters()}
    shares = [(s["exp_avg"].abs() < 0.05 * s["hessian"]).sum() for s in whole.values()]
    total = sum(s["hessian"].numel() for s in whole.values())
    h = torch.cat([s["hessian"].flatten() for s in whole.values()])
    return everything, float(sum(shares)) / total, float(h.median()), float((h == 0).float().mean())


@pytest.mark.parametrize("kind", ["ddp", "shards"])
def test_stats_of_all_ranks(kind):
    """Shares of one rank's shards sold as the model's, or a log line on rank 0 that blocks the run."""
    results = teams.run(2, statistics, kind=kind)
    assert results[0][0] == results[1][0]
    for found, unclipped, median, zero in results:
        assert found["unclipped"] == pytest.approx(unclipped, abs=1e-12)
        assert found["h_zero"] == pytest.approx(zero, abs=1e-6)
        assert found["h_q50"] == pytest.approx(median, rel=0.05)


def local_kernel():
    x, y, _ = share()
    model = layouts.sharded()
    opt = sophia(model)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(any(t.__name__ == "DTensor" for t in types))
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        opt.zero_grad()
        model(x, y)[1].backward()
        with Watch() if opt.param_groups[0]["step"] == 1 else layouts.nullcontext():
            opt.step()
    return len(seen), sum(seen), [local(p).is_contiguous() for p in model.parameters()]


def test_step_runs_on_local_shards():
    """Element-wise operations on DTensors: slow, and known to leak."""
    for operations, on_dtensors, _ in teams.run(2, local_kernel):
        assert operations > 0
        assert on_dtensors == 0


def objects_left():
    x, y, _ = share()
    model = layouts.sharded()
    opt = sophia(model)

    def train(steps):
        for _ in range(steps):
            opt.zero_grad()
            model(x, y)[1].backward()
            opt.step()
        gc.collect()
        return len(gc.get_objects())

    before = train(6)
    return train(30) - before


def test_nothing_is_left_behind_by_a_step():
    """Caches that grow with every operation on a DTensor: thousands of objects a step."""
    assert all(left < 30 for left in teams.run(2, objects_left))
