"""Recordings that do not count: gradients thrown away without the optimizer's ``zero_grad``, forwards that no
backward reached, more of them than memory should hold.
"""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaWarning
from sophia.refresh.arrivals import MOST, MOST_UNUSED
from tiny import (
    GPT,
    Bare,
    LabelsFromLogits,
    data,
    estimate_in_state,
    oracle,
    relative_error,
    weights_in_means,
)


def sophia(model, **settings):
    return Sophia(model, **{"fraction": 1.0, "likelihood": LabelsFromLogits(), **settings})


def to_none(model):
    model.zero_grad()


def to_zero(model):
    model.zero_grad(set_to_none=False)


def by_hand(model):
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize("clear", [to_none, to_zero, by_hand])
@pytest.mark.parametrize("order", ["clear, forward, backward", "forward, clear, backward"])
@pytest.mark.parametrize("sizes", [[16], [4, 4, 8]], ids=["one micro-batch", "three"])
def test_a_batch_skipped_by_the_loop_does_not_count(clear, order, sizes):
    """A loop that leaves out a bad batch and clears by the model: B was that of both, h a mixture."""
    model, (x, y) = GPT(), data(padded=True)
    bad, labels = x.flip(0), y.flip(0)
    weights = weights_in_means(y >= 0, sizes)[y >= 0] / len(sizes)
    expected, count = oracle(model, x, y >= 0, weights=weights)
    opt = sophia(model)
    loss = model(bad, labels)[1]
    (loss * float("nan")).backward()  # no step: the loop saw the NaN
    if order.startswith("clear"):
        clear(model)
    for number, (xs, ys) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        loss = model(xs, ys)[1] / len(sizes)
        if number == 0 and order.startswith("forward"):
            clear(model)
        loss.backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_accumulation_with_clipping_between_the_micro_batches_counts_all():
    """Gradients changed in place, or replaced, are still there."""
    model, (x, y) = GPT(), data(padded=True)
    _, count = oracle(model, x, y >= 0)
    opt = sophia(model)
    for number, (xs, ys) in enumerate(zip(x.split(4), y.split(4), strict=True)):
        (model(xs, ys)[1] / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if number == 1:
            for p in model.parameters():
                p.grad = p.grad / 2
    opt.step()
    assert opt.stats()["B"] == count


def test_all_forwards_before_all_backwards_in_any_order_count():
    """The first to be reached is not the first that ran."""
    model, (x, y) = GPT(), data(padded=True)
    _, count = oracle(model, x, y >= 0)
    opt = sophia(model)
    losses = [model(xs, ys)[1] for xs, ys in zip(x.split(4), y.split(4), strict=True)]
    for loss in reversed(losses):
        loss.backward()
    opt.step()
    assert opt.stats()["B"] == count


def test_a_part_without_gradient_is_no_sign():
    """Adapters begin with zero gradients in one of their factors: that is not a cleared gradient."""
    model, (x, y) = Bare(), data()
    opt = sophia(model)
    first = next(model.parameters())
    for xs, ys in zip(x.split(8), y.split(8), strict=True):
        F.cross_entropy(model(xs).flatten(0, 1), ys.flatten()).backward()
        first.grad.zero_()
    opt.step()
    assert opt.stats()["B"] == y.numel()


@pytest.mark.parametrize("frozen", [False, True], ids=["cleared by zero_grad", "frozen meanwhile"])
@pytest.mark.parametrize("clear", ["D", "opt"])
def test_a_discriminator_counts_its_own_loss_alone(frozen, clear):
    """The generator's step runs through the discriminator, and its gradients there are thrown away."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    opt = Sophia(discriminator, likelihood="bernoulli", fraction=1.0)
    other = torch.optim.AdamW(generator.parameters())
    z, real = torch.randn(8, 3), torch.randn(8, 4)

    def loss_of(x, label):
        out = discriminator(x)
        return F.binary_cross_entropy_with_logits(out, torch.full_like(out, label))

    discriminator.requires_grad_(not frozen)
    loss_of(generator(z), 1.0).backward()
    other.step()
    discriminator.requires_grad_(True)
    (discriminator if clear == "D" else opt).zero_grad()
    (loss_of(real, 1.0) + loss_of(generator(z).detach(), 0.0)).backward()
    opt.step()
    assert opt.stats()["B"] == 16


def test_forwards_without_a_backward_are_dropped_once_their_graph_is_gone():
    """A validation in training mode: its inputs would stay until the step."""
    model, (x, y) = Bare(layers=1), data(2)
    opt = sophia(model)
    for _ in range(20):
        model(x)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    model(x)
    assert sum(r.reached for r in opt._recorder.recordings) == 1
    assert len(opt._recorder.recordings) == 2
    opt.step()
    assert opt.stats()["B"] == y.numel()


def test_a_forward_whose_graph_lives_is_kept_until_its_backward():
    """It may be reached after a later one: it must not be dropped by then."""
    model, (x, y) = Bare(layers=1), data(2)
    opt = sophia(model)
    early = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    early.backward()
    opt.step()
    assert opt.stats()["B"] == 3 * y.numel()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("backward", [False, True], ids=["never a backward", "with a backward"])
def test_3000_forwards_without_a_step_do_not_stay(backward):
    """Memory that grows until the run ends; said once what was dropped."""
    model = Small()
    opt = Sophia(model, fraction=1e-9)
    x, y = torch.randn(4, 2), torch.randint(0, 3, (4,))

    def run():
        for _ in range(3000):
            loss = F.cross_entropy(model(x), y)
            if backward:
                loss.backward()

    with pytest.warns(SophiaWarning, match=r"more than \d+ training forwards.*call model.eval\(\)") as said:
        run()
    assert len(said) == 1
    gc.collect()
    assert len(opt._recorder.recordings) <= (MOST if backward else MOST_UNUSED + 1)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    assert opt.stats()["refreshes"] == 1


def test_gradients_that_were_never_in_grad_are_not_taken_for_cleared():
    """Where a wrapper keeps them elsewhere until the last micro-batch, zeros in ``.grad`` say nothing."""
    model, (x, y) = GPT(), data(padded=True)
    _, count = oracle(model, x, y >= 0)
    opt, kept = sophia(model), {}

    def aside(p):
        def hook(gradient):
            kept[p] = kept.get(p, 0) + gradient
            return torch.zeros_like(gradient)

        return hook

    nodes = [p.register_hook(aside(p)) for p in model.parameters()]
    for xs, ys in zip(x.split(4), y.split(4), strict=True):
        (model(xs, ys)[1] / 4).backward()
        # zero at the end of every backward, as set by the wrapper itself
    for node in nodes:
        node.remove()
    for p, gradient in kept.items():
        p.grad = gradient
    opt.step()
    assert opt.stats()["B"] == count
