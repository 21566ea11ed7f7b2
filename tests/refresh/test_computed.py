"""Logits that ``logits_fn`` computes: solved for exactly, over backwards and micro-batches, or left alone."""

import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.refresh.computed import Computed

ONE = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0), "update_every": 1, "fraction": 1.0}


def arrived(outputs, logits_of, loss_of):
    """The gradient in the logits as it is found, and as autograd has it."""
    computed = Computed.of(outputs, lambda output: (logits_of(output),))
    z = logits_of(outputs)
    z.retain_grad()
    loss_of(z).backward()
    found = None if computed is None else computed.gradients()
    return None if found is None else found[0], z.grad


def made(*shape):
    torch.manual_seed(0)
    return (torch.randn(shape) * 1.0).requires_grad_() * 1.0


def test_each_logit_of_its_own_part():
    """A factor, a cap, chunks, or differences that are not undone."""
    y = torch.tensor([1, 0, 2, 1])
    ways = [
        lambda z: z / 3,
        lambda z: 5 * torch.tanh(z / 5),
        lambda z: z[:, :3] - 2,
        lambda z: torch.cat([z[2:], z[:2]]),
        lambda z: z.exp(),
    ]
    for way in ways:
        found, exact = arrived(made(4, 5), way, lambda z: F.cross_entropy(z[:, :5], y))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)
    found, exact = arrived(made(8, 1), lambda s: torch.sub(*s.chunk(2)), lambda m: -F.logsigmoid(m).mean())
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


def test_logits_that_share_outputs_are_not_taken_for_their_own():
    """A gradient that is one of many."""
    found, _ = arrived(made(4, 5), lambda z: torch.cat([z, z], -1), lambda z: z.square().mean())
    assert found is None
    weight = torch.randn(9, 5)
    found, _ = arrived(made(4, 5), lambda z: z @ weight.T, lambda z: z.square().mean())
    assert found is None


def test_another_use_of_the_outputs_is_seen():
    """A penalty on the scores taken for a part of the pairs' loss."""
    scores = made(8, 1)
    computed = Computed.of(scores, lambda s: (torch.sub(*s.chunk(2)),))
    (-F.logsigmoid(torch.sub(*scores.chunk(2))).mean() + 0.1 * scores.square().mean()).backward()
    assert computed.gradients() is None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(x)


def weights_read(loop):
    """The weights of all predictions of a step, in order, and whether any was not read."""
    model = Model()
    opt = Sophia(model, logits_fn=lambda z: z / 2, **ONE)
    seen = []
    settle = opt._recorder.other_outputs.settle

    def looked_at(recordings):
        seen.extend((part.weights, part.unread) for r in recordings for part in r.outputs)
        seen.append([len(r.computed.leaves) for r in recordings])
        settle(recordings)

    opt._recorder.other_outputs.settle = looked_at
    loop(model, torch.randn(6, 3), torch.randint(0, 4, (6,)))
    opt.step()
    return seen


def test_micro_batches_are_read_before_the_next_and_let_go():
    """The graphs of all logits of a step, held until it."""

    def loop(model, x, y):
        for part in (slice(0, 2), slice(2, 6)):
            (F.cross_entropy(model(x[part]) / 2, y[part]) / 2).backward()

    (first, _), (second, _), left = weights_read(loop)
    torch.testing.assert_close(first, torch.full((2,), 0.25))
    torch.testing.assert_close(second, torch.full((4,), 0.125))
    assert left == [0, 0]


def test_a_second_backward_after_another_forward_is_not_lost_in_silence():
    """Weights of the first backward alone."""

    def loop(model, x, y):
        z = model(x[:2])
        F.cross_entropy(z / 2, y[:2]).backward(retain_graph=True)
        F.cross_entropy(model(x[2:]) / 2, y[2:]).backward()
        F.cross_entropy(z / 2, y[:2]).backward()

    (_, unread), (_, other), _ = weights_read(loop)
    assert unread
    assert not other
