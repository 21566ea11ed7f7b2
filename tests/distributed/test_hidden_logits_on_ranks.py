"""Models that keep their logits to themselves, on several ranks: the curvature of one process, and errors
that all ranks raise.
"""

import time

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
from layouts import clean, equal_on_all_ranks, plain
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tiny import GPT, data, oracle, relative_error

ROWS = 16


class Trunk(GPT):
    """Hidden states, and a loss of them and of the head's weight: the sum over what counts."""

    def states(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def summed(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


class Alone(Trunk):
    """The loss, in a graph that shows it."""

    def forward(self, ids, targets):
        return summed(self.head(self.states(ids)), targets)


class FusedLoss(torch.autograd.Function):
    """One function for the head and the loss."""

    @staticmethod
    def forward(ctx, states, weight, targets):
        with torch.enable_grad():
            ctx.leaves = [t.detach().requires_grad_() for t in (states, weight)]
            ctx.loss = summed(F.linear(*ctx.leaves), targets)
        return ctx.loss.detach()

    @staticmethod
    def backward(ctx, gradient):
        return (*torch.autograd.grad(ctx.loss, ctx.leaves, gradient), None)


class Fused(Trunk):
    """The loss, in a function that shows nothing."""

    def forward(self, ids, targets):
        return FusedLoss.apply(self.states(ids), self.head.weight, targets)


class Table(Trunk):
    """The same, by the table of the tokens: there is no other output layer."""

    def __init__(self, **settings):
        super().__init__(**settings)
        del self.head

    def forward(self, ids, targets):
        return FusedLoss.apply(self.states(ids), self.tokens.weight, targets)


class States(Trunk):
    """The hidden states alone."""

    def forward(self, ids, targets):
        return self.states(ids)


class Squared(Trunk):
    """On one rank a loss that is no cross-entropy of anything, in a function that shows nothing."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            ctx.save_for_backward(states)
            return states.square().sum()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient * ctx.saved_tensors[0]

    def forward(self, ids, targets):
        states = self.states(ids)
        if dist.get_rank() == 1:
            return self.Loss.apply(states) + 0 * self.head.weight.sum()
        return FusedLoss.apply(states, self.head.weight, targets)


KINDS = {"loss alone": Alone, "fused": Fused, "table": Table, "hidden states": States}


def wrapped(model, layout):
    """``ddp``; ``sharded``: blocks, and all that is left; ``resharded``: that is sharded after the forward,
    too; ``head apart``: the head is sharded by itself.
    """
    if layout == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.blocks, *([model.head] if layout == "head apart" else [])):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, **({"reshard_after_forward": True} if layout == "resharded" else {}))


def loss_of(model, kind, x, y):
    """The sum over this rank's predictions."""
    if kind != "hidden states":
        return model(x, y)
    inner = getattr(model, "module", model)
    return summed(inner.head(model(x, y)), y)


def expected(x, y, tied):
    """Of one process, on all rows."""
    reference = GPT(tied=tied)
    found, count = oracle(reference, x, y >= 0)
    return {name: found[p] for name, p in reference.named_parameters()}, count


def on_ranks(kind, layout, tied, empty, halves, steps=3):
    """Error of h after each of some steps, with weights that stay; and whether all ranks have the same."""
    x, y = data(ROWS, padded=True)
    if empty:
        y[ROWS // 2 :] = -1
    size = dist.get_world_size()
    count = int((y >= 0).sum())
    place = slice(dist.get_rank() * ROWS // size, (dist.get_rank() + 1) * ROWS // size)
    mine = x[place], y[place]
    model = wrapped(KINDS[kind](tied=tied), layout)
    opt = layouts.sophia(model, lr=0.0, betas=(0.9, 0.0), weight_decay=0.0, update_every=1)
    whole, _ = expected(x, y, tied)
    found = []
    for _ in range(steps):
        opt.zero_grad()
        for ids, targets in zip(*(part.chunk(2 if halves else 1) for part in mine), strict=True):
            (loss_of(model, kind, ids, targets) * size / count).backward()
        opt.step()
        state = {clean(n): plain(opt.state[p]["hessian"]) for n, p in model.named_parameters()}
        found.append((relative_error(state, {n: whole[n] for n in state}), opt.stats()["B"] == count))
    return found, equal_on_all_ranks(opt.state[p]["hessian"] for p in model.parameters())


LAYOUTS = [
    ("loss alone", "ddp"),
    ("loss alone", "sharded"),
    ("loss alone", "head apart"),
    ("fused", "ddp"),
    ("fused", "sharded"),
    ("fused", "resharded"),
    ("table", "ddp"),
    ("table", "resharded"),
    ("hidden states", "ddp"),
    ("hidden states", "sharded"),
    ("hidden states", "head apart"),
]


@pytest.mark.parametrize(
    ("halves", "empty"), [(False, False), (True, False), (True, True)], ids=["2x8", "2x2x4", "empty"]
)
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_hidden_predictions_on_ranks_equal_one_process(kind, layout, halves, empty):
    """A forward more on one rank than on the other, a weight that one rank gathers alone, a mean of one
    rank's predictions taken for that of all, no prediction at all on one rank.
    """
    arguments = {"kind": kind, "layout": layout, "tied": layout != "head apart"}
    for found, equal in teams.run(2, on_ranks, within=30, **arguments, halves=halves, empty=empty):
        for error, counted in found:
            assert error < 1e-5
            assert counted
        assert equal


def no_loss_on_one_rank(layout, halves):
    model = wrapped(Squared(tied=False), layout)
    opt = layouts.sophia(model)
    x, y, _ = layouts.share()
    for ids, targets in zip(*(part.chunk(2 if halves else 1) for part in (x, y)), strict=True):
        model(ids, targets).backward()
    opt.step()


@pytest.mark.parametrize("halves", [False, True], ids=["2x8", "2x2x4"])
@pytest.mark.parametrize("layout", ["ddp", "sharded"])
def test_a_loss_that_is_not_found_on_one_rank_ends_all(layout, halves):
    """The others would wait, in a forward or in a sum, until the time-out."""
    begun = time.monotonic()
    (kind0, text0), (kind1, text1) = teams.failures(
        2, no_loss_on_one_rank, within=30, layout=layout, halves=halves
    )
    assert (kind0, kind1) == ("raised", "raised")
    assert "failed on rank 1, so this rank stops too" in text0
    assert "where the predictions are made could not be found" in text1
    assert time.monotonic() - begun < 30
