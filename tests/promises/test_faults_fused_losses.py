"""Losses that make the logits themselves, in the model or in the loop; each is held to a twin that returns
them.
"""

import gc
import weakref

import pytest
import torch
from curvature_cases import cross_entropy, sentences
from torch import nn
from torch.nn import functional as F
from twins import Around, Net, check_twins, logits, mean, trained

from said import said
from sophia import Sophia


class Fused(torch.autograd.Function):
    """Losses of the labels, with nothing to be seen between them and the hidden states."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, after, smoothing):
        with torch.enable_grad():
            leaves = [t if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
            z = after(F.linear(*leaves))
            losses = cross_entropy(z, targets, reduction="none", label_smoothing=smoothing)
        ctx.leaves, ctx.losses = leaves, losses
        return losses.detach().view(targets.shape)

    @staticmethod
    def backward(ctx, gradient):
        leaves = [t for t in ctx.leaves if t is not None]
        found = [*torch.autograd.grad(ctx.losses, leaves, gradient.flatten()), None][:3]
        return (*found, None, None, None)


def fused(net, ids, targets, *, after=lambda z: z, smoothing=0.0):
    layer = net.head
    losses = Fused.apply(
        net.hidden(ids), layer.weight, getattr(layer, "bias", None), targets, after, smoothing
    )
    return losses.sum() / (targets >= 0).sum()


class Tied(Net):
    """The table of the tokens makes the logits, too."""

    def __init__(self):
        super().__init__()
        self.head = self.tokens

    def forward(self, ids):
        return F.linear(self.hidden(ids), self.tokens.weight)


class Functional(Net):
    """The last normalisation is no module."""

    def hidden(self, ids):
        return F.layer_norm(super().hidden(ids), (12,))


class Config:
    final_logit_softcapping, logit_scale = 2.0, 0.5


class Configured(Net):
    """A model whose configuration speaks of a scale and a cap."""

    config = Config()

    def get_output_embeddings(self):
        return self.head


def scaled_cap(z):
    return 2 * torch.tanh(0.5 * z / 2)


FUSED = {
    "mean": (fused, logits, mean, Net),
    "smaller": (
        lambda net, x, y: 0.25 * fused(net, x, y),
        logits,
        lambda z, y: 0.25 * mean(z, y),
        Net,
    ),
    "smoothed": (
        lambda net, x, y: fused(net, x, y, smoothing=0.2),
        logits,
        lambda z, y: cross_entropy(z, y, label_smoothing=0.2, reduction="sum") / (y >= 0).sum(),
        Net,
    ),
    "tied": (fused, logits, mean, Tied),
    "after a function": (fused, logits, mean, Functional),
    "scaled and capped": (
        lambda net, x, y: fused(net, x, y, after=scaled_cap),
        lambda net, x: scaled_cap(net(x)),
        mean,
        Configured,
    ),
    "configured so, and not done": (fused, logits, mean, Configured),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_loss_inside_of_the_model(name):
    inside, outside, loss, net = FUSED[name]
    check_twins(inside, outside, loss, net=net, close=1e-3)


@pytest.mark.parametrize("net", [Net, Functional])
def test_its_rows_are_run_alone(net):
    def data():
        return sentences((6,) * 8)

    stats = check_twins(fused, logits, mean, net=net, close=1e-3, fraction=0.25, data=data)
    assert stats["share"] == 0.25


def test_unequal_weights_before_the_head():
    """A mean of the means of the rows."""

    def inside(net, ids, targets):
        losses = Fused.apply(net.hidden(ids), net.head.weight, net.head.bias, targets, lambda z: z, 0.0)
        return (losses.sum(1) / (targets >= 0).sum(1)).mean()

    def outside(z, targets):
        losses = cross_entropy(z, targets, reduction="none").view(targets.shape)
        return (losses.sum(1) / (targets >= 0).sum(1)).mean()

    check_twins(inside, logits, outside, close=1e-3)


def test_log_probabilities_of_the_labels():
    """As trl's trainers have it: they come out of the fused loss, beside others that the loss leaves out."""

    class Output(dict):
        pass

    def inside(net, ids, targets):
        hidden = net.hidden(ids)[:, :-1]
        losses = Fused.apply(hidden, net.head.weight, net.head.bias, targets[:, 1:], lambda z: z, 0.0)
        return Output(log_probs=-losses, entropy=losses.detach() + hidden.sum(-1), loss=losses.detach().sum())

    class Named(Net):
        def get_output_embeddings(self):
            return self.head

    ids, targets = sentences((6, 5, 3, 2))
    torch.manual_seed(0)
    found, words, stats = trained(
        Around(Named(), inside),
        lambda m: -m(ids, targets)["log_probs"].sum() / (targets[:, 1:] >= 0).sum(),
    )
    torch.manual_seed(0)
    expected, _, of_twin = trained(Around(Named(), logits), lambda m: mean(m(ids)[:, :-1], targets[:, 1:]))
    assert words == []
    assert stats["B"] == of_twin["B"] == 12
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


# ---- hidden states returned, the loss outside ----


class Trunk(nn.Module):
    """Leaves head and loss to the loop."""

    def __init__(self, width, returned):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(64, width), nn.Linear(width, width, bias=False)
        self.returned = returned

    def forward(self, ids):
        states = torch.tanh(self.mix(self.tokens(ids)))
        return F.linear(states, self.tokens.weight) if self.returned == "logits" else states


def fused_outside(states, weight, targets):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    return F.linear_cross_entropy(states.flatten(0, 1), weight, targets.flatten())


def plain_outside(states, weight, targets):
    return cross_entropy(states @ weight.T, targets)


@pytest.mark.parametrize(
    ("width", "autocast", "outside"),
    [
        (64, False, plain_outside),
        (768, False, plain_outside),
        (768, True, plain_outside),
        (768, False, fused_outside),
    ],
    ids=["64", "768", "768-bfloat16", "768-fused"],
)
def test_hidden_states_and_a_loss_outside(width, autocast, outside):
    """A tied head outside of the model: its gradient sums to little at a real width."""
    g = torch.Generator().manual_seed(width)
    ids, targets = torch.randint(0, 64, (8, 8), generator=g), torch.randint(0, 64, (8, 8), generator=g)
    results = []
    for returned in ("states", "logits"):
        torch.manual_seed(0)

        def loss(model, returned=returned):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                output = model(ids)
                if returned == "logits":
                    return cross_entropy(output, targets)
                return outside(output, model.tokens.weight, targets)

        results.append(trained(Trunk(width, returned), loss, lr=1e-4))
    (found, words, stats), (expected, _, _) = results
    assert words == []
    assert stats["B"] > 1
    for name, h in expected.items():
        difference = float((found[name] - h).norm() / h.norm())
        assert difference < (0.1 if autocast else 1e-3), (name, difference)


def test_probabilities_of_a_layer_are_its_logits():
    """A model that ends in a softmax, and the logarithm outside: what the loss is made of is found."""
    ids, targets = sentences()
    targets = targets.clamp(min=0)

    def inside(net, ids):
        return net(ids).softmax(-1)

    torch.manual_seed(0)
    found, words, _ = trained(
        Around(Net(), inside), lambda m: F.nll_loss(m(ids).log().flatten(0, 1), targets.flatten())
    )
    torch.manual_seed(0)
    expected, _, _ = trained(Around(Net(), logits), lambda m: mean(m(ids), targets))
    assert words == []
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


# ---- what cannot be found ----


def test_a_head_outside_of_the_model_is_told():
    """The output layer is not the model's: nobody could know it."""
    ids, targets = sentences()
    torch.manual_seed(0)
    model, head = Around(Net(), lambda net, ids: net.hidden(ids)), nn.Linear(12, 7)
    before = [p.clone() for p in model.parameters()]
    opt = Sophia(model)
    mean(head(model(ids)), targets).backward()
    with pytest.raises(RuntimeError, match=r"logits_fn=lambda hidden"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loss_that_changes_its_kind_ends_nothing():
    ids, targets = sentences()
    torch.manual_seed(0)
    net, calls = Net(), []

    def inside(net, ids, targets):
        calls.append(None)
        loss = fused(net, ids, targets)
        return loss if len(calls) < 3 else loss + net.hidden(ids).square().sum()

    model = Around(net, inside)
    opt = Sophia(model, update_every=1, lr=1e-4)

    def run():
        for _ in range(4):
            model(ids, targets).backward()
            opt.step()
            opt.zero_grad()

    assert any("is so no longer" in words for words in said(run))


def test_a_fused_model_is_run_once_more_only_at_first():
    """Later its last hidden states are listened to in the training forwards themselves."""
    ids, targets = sentences((6,) * 8)
    torch.manual_seed(0)
    net = Net()
    model, calls = Around(net, fused), []
    model.register_forward_hook(lambda *_: calls.append(None))
    opt = Sophia(model, lr=1e-4, update_every=1, fraction=1.0)
    numbers = []
    for _ in range(3):
        calls.clear()
        model(ids, targets).backward()
        opt.step()
        opt.zero_grad()
        numbers.append(len(calls))
    assert numbers[1:] == [2, 2]  # the training forward, and that of the refresh
    assert not net.norm._forward_hooks
    assert not net._forward_hooks


def test_no_hidden_states_are_kept():
    """Hidden states are as large as a layer's, and hold the graph that made them."""
    ids, targets = sentences((6,) * 8)
    torch.manual_seed(0)
    model = Around(Net(), fused)
    made = []
    model.net.norm.register_forward_hook(lambda _module, _args, output: made.append(weakref.ref(output)))
    opt = Sophia(model, lr=1e-4, update_every=1)
    for _ in range(2):
        model(ids, targets).backward()
        opt.step()
        opt.zero_grad()
    gc.collect()
    assert len(made) >= 4
    assert all(ref() is None for ref in made)


def test_few_dimensions_show_no_layer():
    """Of 50 rows in two dimensions one points in nearly every direction."""

    class Narrow(Net):
        def __init__(self):
            super().__init__(width=2, vocabulary=50)

    ids, targets = sentences()
    torch.manual_seed(0)
    model = Around(
        Narrow(), lambda net, ids, targets: net.hidden(ids).square().sum() * fused(net, ids, targets)
    )
    opt = Sophia(model)
    model(ids, targets).backward()
    with pytest.raises(RuntimeError, match=r"could not be found"):
        opt.step()
