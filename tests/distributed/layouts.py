"""What the ranks run: one model in every layout, and what came out of it, compared with one process."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from sophia.likelihoods import Categorical
from tiny import GPT, LabelsFromLogits, data, estimate_in_state, oracle, weights_in_means

ROWS = 16


class OnePair(Categorical):
    """The same labels for every prediction: rounding of the logits cannot change them."""

    def __init__(self):
        super().__init__(pairs=1)

    def draw(self, probabilities, uniforms):
        return torch.tensor([7, 11]).expand(len(probabilities), 2)


def share(padded=True):
    """This rank's rows of the batch that all ranks have together, and how many predictions count in all."""
    x, y = data(ROWS, padded=padded)
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    return x[mine], y[mine], int((y >= 0).sum())


def plain(tensor):
    """A whole plain tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clean(name):
    for prefix in ("_fsdp_wrapped_module.", "module.", "_orig_mod."):
        name = name.replace(prefix, "")
    return name


# ---- the layouts ----


def ddp(**settings):
    return DistributedDataParallel(GPT(**settings.pop("model", {})), **settings)


def sharded(mesh=None, model=None, policy=None, reshard=True):
    """FSDP2, block by block; a 2-D mesh makes it HSDP."""
    return wrap(GPT(**(model or {})), "sharded", mesh=mesh, policy=policy, reshard=reshard)


def wrap(built, kind, *, mesh=None, policy=None, reshard=True):
    """Shard a model that exists already."""
    more = {"reshard_after_forward": reshard}
    if policy is not None:
        more["mp_policy"] = policy
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in built.blocks:
        fully_shard(block, mesh=mesh, **more)
    return fully_shard(built, mesh=mesh, **more)


def hybrid(**settings):
    return sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), **settings)


def half_precision():
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def flat(**settings):
    """FSDP1, block by block."""
    built = GPT()
    for i, block in enumerate(built.blocks):
        built.blocks[i] = FullyShardedDataParallel(block, device_id=torch.device("cpu"), **settings)
    return FullyShardedDataParallel(built, device_id=torch.device("cpu"), **settings)


# ---- what came out ----


def compare(model, opt, *, means=None, summed=False, whole=None):
    """Distance of the estimate in the state from one process's, over all coordinates together.

    ``means``: in how many equal parts of the rows the loss was averaged, each by itself; their mean is the
    loss that was trained, or their sum. None: a mean over all predictions.
    """
    reference = GPT()
    x, y = data(ROWS, padded=True)
    mask = y >= 0
    weights = None
    if means is not None:
        weights = (weights_in_means(mask, ROWS // means) / (1 if summed else means))[mask].float()
    expected, count = oracle(reference, x, mask, likelihood=opt.likelihood, weights=weights)
    estimates = {id(p): e for p, e in estimate_in_state(opt).items()}
    names = {clean(name): p for name, p in model.named_parameters()}
    wrong = size = 0.0
    for name, parameter in reference.named_parameters():
        if name not in names:  # tied
            continue
        found = estimates[id(names[name])]
        found = (plain(found) if whole is None else whole(names[name], found)).float()
        wrong += float((found - expected[parameter]).square().sum())
        size += float(expected[parameter].square().sum())
    return (wrong / size) ** 0.5, count


def whole_of_flat(model):
    """From FSDP1's flattened part of a parameter to the whole: a function of the parameter and its part."""
    where = {}
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if isinstance(module, FullyShardedDataParallel) and handle is not None:
            flat_param = handle.flat_param
            rows = zip(flat_param._params, flat_param._shapes, flat_param._shard_param_infos, strict=True)
            where.update({id(p): (shape, info) for p, shape, info in rows})

    def whole(parameter, part):
        shape, info = where[id(parameter)]
        full = torch.zeros(shape).flatten()
        if info.in_shard:
            full[info.intra_param_start_idx : info.intra_param_end_idx + 1] = part.flatten()
        dist.all_reduce(full, group=model.process_group)  # not over the replicas, which hold the same
        return full.view(shape)

    return whole


def equal_on_all_ranks(tensors):
    """Whether these are the same bits everywhere."""
    same = True
    for tensor in tensors:
        first = plain(tensor).detach().clone()
        dist.broadcast(first, 0)
        same &= torch.equal(first, plain(tensor).detach())
    flag = torch.tensor([float(same)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def bits(gradients):
    return [None if g is None else (g.to_local() if isinstance(g, DTensor) else g).clone() for g in gradients]


def same_bits(before, after):
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(before, after, strict=True)
    )


def step_and_watch(model, opt):
    """Take a step; whether the training gradients are bit for bit what they were before."""
    before = bits(p.grad for p in model.parameters())
    opt.step()
    return same_bits(before, bits(p.grad for p in model.parameters()))


def local_loss(model, x, y):
    """The mean over all predictions of all ranks, if the wrapper averages over the ranks."""
    count = torch.tensor([float((y >= 0).sum())])
    dist.all_reduce(count)
    logits, _ = model(x)
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction="sum"
    )
    return total * dist.get_world_size() / count.item()


def sophia(model, **settings):
    return Sophia(model, **{"likelihood": LabelsFromLogits(), "fraction": 1.0, "update_every": 2, **settings})


@contextmanager
def without_sync(model):
    """Accumulation as each wrapper wants it."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else nullcontext():
            yield


def report(model, opt, *, accumulate=False, summed=False, whole=None, steps=4):
    """Train for a few steps: error of the first estimate, its count, and what must be equal."""
    means = dist.get_world_size() * (2 if accumulate else 1)
    x, y, _ = share()
    result = {}
    for i in range(steps):
        opt.zero_grad()
        if accumulate:
            half = len(x) // 2
            with without_sync(model):
                (model(x[:half], y[:half])[1] / 2).backward()
            (model(x[half:], y[half:])[1] / 2).backward()
        else:
            model(x, y)[1].backward()
        untouched = step_and_watch(model, opt)
        if i == 0:
            result["error"], result["true_B"] = compare(model, opt, means=means, summed=summed, whole=whole)
            result["B"] = opt.stats()["B"]
            result["untouched"] = untouched
    result["equal"] = equal_on_all_ranks(
        [] if whole is not None else [t for p in model.parameters() for t in (p, opt.state[p]["hessian"])]
    )
    result["refreshes"] = opt.stats()["refreshes"]
    return result
