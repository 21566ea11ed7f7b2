"""A model that keeps its logits to itself, held to its twin, which returns them.

With the same seed both draw the same labels, so that h is the same number for number.
"""

import torch
from curvature_cases import Words, cross_entropy, sentences
from torch import nn

from said import said
from sophia import Sophia


class Net(Words):
    """Logits of a token and all before it; hidden states that a module of their own makes."""

    def __init__(self, width=12, vocabulary=7):
        super().__init__()
        self.tokens, self.head, self.norm = (
            nn.Embedding(vocabulary, width),
            nn.Linear(width, vocabulary),
            nn.Tanh(),
        )

    def hidden(self, ids):
        return self.norm(self.tokens(ids).cumsum(1))

    def forward(self, ids):
        return self.head(self.hidden(ids))


class Around(nn.Module):
    """A model around a net, with another forward."""

    def __init__(self, net, forward):
        super().__init__()
        self.net, self._forward = net, forward

    def forward(self, *args):
        return self._forward(self.net, *args)


def trained(model, loss, steps=3, **settings):
    """H by name after some steps, and what was said; the weights move as they please."""
    settings = {"lr": 1e-2, "weight_decay": 0.0, "update_every": 1, "fraction": 1.0, **settings}
    opt = Sophia(model, **settings)

    def run():
        for _ in range(steps):
            loss(model).backward()
            opt.step()
            opt.zero_grad()

    words = said(run)
    named = dict(model.named_parameters())
    return {n: opt.state[p]["hessian"] for n, p in named.items() if opt.state.get(p)}, words, opt.stats()


def check_twins(inside, outside, loss, *, net=Net, close=1e-4, **settings):
    """``inside(net, ids, targets) -> loss`` of a model that is called so, and ``loss(outside(net, ids),
    targets)`` of its twin.
    """
    ids, targets = settings.pop("data", sentences)()
    results = []
    for of_twin in (False, True):
        torch.manual_seed(0)
        model = Around(net(), outside if of_twin else inside)
        if of_twin:
            results.append(trained(model, lambda m: loss(m(ids), targets), **settings))
        else:
            results.append(trained(model, lambda m: m(ids, targets), **settings))
    (found, words, stats), (expected, _, of_twin) = results
    assert words == []
    assert stats["B"] == of_twin["B"]
    for name, h in expected.items():
        assert float((found[name] - h).norm()) <= close * float(h.norm()), name
    return stats


def logits(net, ids):
    return net(ids)


def mean(z, targets):
    return cross_entropy(z, targets)
