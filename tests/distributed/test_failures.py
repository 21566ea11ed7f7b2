"""When something is wrong on one rank: every rank stops with a cause, or every rank goes on. None waits."""

import os
import re
import signal
import time

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
from layouts import equal_on_all_ranks, share, sophia
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia, SophiaWarning
from sophia.curvature import Estimate, Estimator
from sophia.distributed.shards import local
from sophia.refresh.sandbox import in_sandbox
from tiny import GPT, data, estimate_in_state

OTHER = "the Hessian pass failed on rank 1, so this rank stops too"


class FailsInReplay(GPT):
    def forward(self, ids, targets=None):
        if in_sandbox() and dist.get_rank() == 1:
            raise ValueError("only here")
        return super().forward(ids, targets)


def fails(how):
    x, y = data(4)
    if how == "in the forward":
        model = FailsInReplay()
        opt = sophia(model)
        model(x, y)[1].backward()
        opt.step()
    elif how == "nothing recorded":
        model = GPT()
        opt = sophia(model)
        if dist.get_rank() == 0:
            model(x, y)[1].backward()
        opt.step()
    elif how == "by hand":
        model = GPT()
        opt = sophia(model, mode="manual")
        with opt.hessian_pass() as hp:
            hp.sampled_loss(model(x)[0]).backward()
            if dist.get_rank() == 1:
                raise ValueError("only here")


@pytest.mark.parametrize(
    ("how", "own"),
    [
        ("in the forward", "ValueError: only here"),
        ("nothing recorded", "ran no forward in training mode"),
        ("by hand", "ValueError: only here"),
    ],
)
def test_an_error_on_one_rank_ends_all(how, own):
    """The others would wait in the sum of the gradients until the time-out, with a message about sockets."""
    begun = time.monotonic()
    (kind0, text0), (kind1, text1) = teams.failures(2, fails, how=how)
    assert (kind0, kind1) == ("raised", "raised")
    assert OTHER in text0
    assert own in text1
    assert time.monotonic() - begun < 30


class NeedsAllRows(GPT):
    def forward(self, ids, targets=None):
        if ids.shape[0] not in (1, 8):
            raise ValueError("a batch of 8 or 1")
        return super().forward(ids, targets)


def rows_on_one_rank():
    """Rank 0 has one row, which cannot be cut; rank 1 has eight, and finds out that they must not be."""
    model = NeedsAllRows()
    opt = sophia(model, fraction=0.5)
    x, y = data(1 if dist.get_rank() == 0 else 8)
    counts = []
    for _ in range(3):
        opt.zero_grad()
        model(x, y)[1].backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        with layouts.nullcontext() if counts else pytest.warns(SophiaWarning, match="runs the whole of it"):
            opt.step()
        counts.append(opt.stats()["B"])
    return counts, equal_on_all_ranks(model.parameters())


def test_falling_back_to_whole_batches_is_a_common_decision():
    """One rank that repeats its pass alone: the ranks wait in different collectives."""
    for counts, equal in teams.run(2, rows_on_one_rank):
        assert counts == [9 * 16.0] * 3
        assert equal


class OddOnOneRank(Estimator):
    def __init__(self, value):
        self.value = value

    def estimate(self, context):
        mine = self.value if dist.get_rank() == 1 else 1.0
        return Estimate([torch.full_like(local(p), mine) for p in context.parameters], context.count)


def odd_shard(value):
    x, y, _ = share()
    model = layouts.sharded()
    opt = sophia(model, estimator=OddOnOneRank(value))
    model(x, y)[1].backward()
    if value == 0.0:
        opt.step()
    else:
        with pytest.warns(SophiaWarning, match="not finite"):
            opt.step()
    stats = opt.stats()
    return stats["skipped"], stats["refreshes"]


@pytest.mark.parametrize(
    ("value", "skipped"), [(float("inf"), 1.0), (float("nan"), 1.0), (0.0, 0.0)], ids=["inf", "nan", "zero"]
)
def test_a_pass_is_skipped_by_all_ranks_or_by_none(value, skipped):
    """Curvature renewed on one shard alone; or a refresh lost as one rank's shard has no curvature."""
    assert teams.run(2, odd_shard, value=value) == [(skipped, 1.0 - skipped)] * 2


# ---- what is refused ----


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.head(self.embed(x))


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def train_once(model, opt, x=None, y=None):
    x, y = data(4) if x is None else (x, y)
    model(x, y)[1].backward()
    opt.step()


def unlike_replicas():
    model = GPT()
    with torch.no_grad():
        model.positions.weight.add_(0.01 * dist.get_rank())
    train_once(model, sophia(model))


def shards_alone():
    model = layouts.sharded()
    train_once(model, sophia(model, process_group=False))


def twice_through_shards():
    model = layouts.sharded()
    train_once(model, sophia(model, estimator="hutchinson"))


def unexplained_tensors():
    model = GPT()
    for block in model.blocks:
        parallelize_module(block, mesh_of_all(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    train_once(model, sophia(model))


def split_logits():
    model = parallelize_module(TwoLayers(), mesh_of_all(), {"head": ColwiseParallel(use_local_output=False)})
    opt = Sophia(model, process_group=False)
    model(torch.arange(8))
    opt.step()


def shards_without_their_model():
    model = layouts.sharded()
    opt = Sophia(model.parameters(), mode="manual")
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(data(4)[0])[0]).backward()


def stale_parameters():
    model = GPT()
    opt = sophia(model)
    layouts.wrap(model, "sharded")
    train_once(model, opt)


def one_flat_vector():
    Sophia(layouts.flat(use_orig_params=False))


def inside_the_flat_wrapper():
    model = layouts.flat(use_orig_params=True)
    opt = Sophia(list(model.blocks.parameters()), model=model.blocks, mode="manual")
    opt.attach(model.module.blocks[0].module)
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(data(4)[0])[0]).backward()


def unreduced():
    model = layouts.sharded()
    opt = sophia(model, mode="manual")
    model.set_requires_gradient_sync(False)
    model(*data(4))[1].backward()
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(data(4)[0])[0]).backward()


def uncuttable_shards():
    torch.manual_seed(0)
    model = layouts.wrap(NeedsAllRows(), "sharded")
    train_once(model, sophia(model, fraction=0.5), *data(8))


def hooked_flat():
    model = layouts.flat(use_orig_params=True)
    model.register_comm_hook(None, lambda state, *gradients: None)
    train_once(model, sophia(model))


def somebody_else_s_group():
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = GPT()
    train_once(model, sophia(model, process_group=groups[1 - dist.get_rank()]))


def halved_ddp():
    from torch.nn.parallel.distributed import _MixedPrecision

    wrapped = DistributedDataParallel(GPT())
    wrapped.mixed_precision = _MixedPrecision()
    Sophia(wrapped)


REFUSED = [
    (unlike_replicas, "hold different parameters"),
    (shards_alone, "its backward sums over those whatever is said here"),
    (twice_through_shards, "differentiates twice"),
    (unexplained_tensors, "are DTensors that no fully_shard"),
    (split_logits, "the logits of .* are a DTensor"),
    (shards_without_their_model, "this optimizer knows no model"),
    (stale_parameters, "Build Sophia after wrapping"),
    (one_flat_vector, "use_orig_params=False"),
    (inside_the_flat_wrapper, "Build Sophia from the outermost wrapper"),
    (unreduced, "gradients of earlier micro-batches are still unreduced"),
    (uncuttable_shards, "Pass fraction=1.0"),
    (hooked_flat, "a communication hook"),
    (somebody_else_s_group, "does not contain this process"),
    (halved_ddp, "frees its half-precision parameters"),
]


def refusal(name):
    """Run a case that must raise; what it said."""
    try:
        globals()[name]()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(("case", "text"), REFUSED, ids=[case.__name__ for case, _ in REFUSED])
def test_refused_on_all_ranks(case, text):
    """A curvature that is wrong by a factor, or a run that hangs, in place of a sentence."""
    messages = teams.run(2, refusal, name=case.__name__)
    for message in messages:
        assert re.search(text, message), message


# ---- a rank that ends ----


def one_rank_is_killed():
    model = GPT()
    opt = sophia(model)
    train_once(model, opt)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    opt.zero_grad()
    model(*data(4))[1].backward()
    opt.step()  # not due: needs nobody
    opt.zero_grad()
    model(*data(4))[1].backward()
    opt.step()


def test_a_killed_rank_ends_the_others_with_a_named_cause():
    """A run that stands still for the half hour of a default time-out."""
    begun = time.monotonic()
    (kind, text), ended = teams.failures(2, one_rank_is_killed, within=50)
    assert ended == ("ended", -signal.SIGKILL)
    assert kind == "raised"
    assert "rank 0 got no answer from the other ranks during a refresh of the Hessian" in text
    assert time.monotonic() - begun < 40


def state_after(steps):
    model = GPT()
    opt = sophia(model)
    for _ in range(steps):
        opt.zero_grad()
        model(*data(4))[1].backward()
        opt.step()
    return [h.sum().item() for h in estimate_in_state(opt).values()]


def test_a_team_after_a_failure_is_a_new_one():
    """Cases that inherit the broken collectives of an earlier one."""
    first, second = teams.run(2, state_after, steps=1)
    assert first == second
