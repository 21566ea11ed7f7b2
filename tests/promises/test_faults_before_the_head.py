"""Fused losses in micro-batches without a counted label, beside hidden states that are returned too, and by
tables among many layers of their width.
"""

import pytest
import torch
from curvature_cases import cross_entropy, sentences
from test_faults_fused_losses import Fused, Tied, fused
from torch import nn
from torch.nn import functional as F
from twins import Around, Net, check_twins, logits, mean, trained

from said import said
from sophia import Sophia


def losses_summed(net, ids, targets):
    layer = net.head
    return Fused.apply(net.hidden(ids), layer.weight, layer.bias, targets, lambda z: z, 0.0).sum()


def micro_batches(order):
    """Two of them; the second has no label."""
    ids, targets = sentences((6,) * 4)
    targets[2:] = -100
    return [(ids[2 * i : 2 * i + 2], targets[2 * i : 2 * i + 2]) for i in order]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["last", "first"])
def test_a_micro_batch_without_a_label_before_the_head(order):
    """Nothing arrives in its hidden states, which was taken for a loss that is not to be found."""
    batches, results = micro_batches(order), []
    count = sum(int((y >= 0).sum()) for _, y in batches)
    for alone in (True, False):
        torch.manual_seed(0)
        model = Around(Net(), losses_summed if alone else logits)

        def loss(m, alone=alone):
            of_each = (m(x, y) if alone else cross_entropy(m(x), y, reduction="sum") for x, y in batches)
            return sum(of_each) / count

        results.append(trained(model, loss))
    (found, words, stats), (expected, _, of_twin) = results
    assert words == []
    assert stats["B"] == of_twin["B"] == count
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


def test_a_first_step_without_any_label():
    """It is skipped, and said; the next one finds what it is made of."""
    (full, empty), model = micro_batches((0, 1)), Around(Net(), losses_summed)
    opt = Sophia(model, update_every=1, lr=1e-3)

    def run(ids, targets):
        model(ids, targets).backward()
        opt.step()
        opt.zero_grad()

    (words,) = said(lambda: run(*empty))
    assert "no prediction was counted" in words
    assert said(lambda: run(*full)) == []
    assert (opt.stats()["refreshes"], opt.stats()["skipped"]) == (1, 1)


class Deep(Tied):
    """Six linear layers of the width of the table."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(12, 12) for _ in range(6)))
        self.positions = nn.Embedding(6, 12)

    def hidden(self, ids):
        return self.norm(self.layers(self.tokens(ids).cumsum(1) + self.positions.weight))


def test_a_table_among_many_layers():
    """As in any transformer that is tied by hand: the layers of the trunk were tried, and not the table."""
    check_twins(fused, logits, mean, net=Deep, close=1e-3)


@pytest.mark.parametrize("place", ["states", "both"])
def test_states_that_are_returned_beside_the_loss_made_of_them(place):
    """Their gradient came through the loss: counted once more, every prediction would weigh twice as much."""

    def inside(net, ids, targets):
        table, layer = net.tokens(ids), net.head
        states = net.norm(table.cumsum(1))
        losses = Fused.apply(states, layer.weight, layer.bias, targets, lambda z: z, 0.0)
        others = (states,) if place == "states" else (table, states)
        return {"loss": losses.sum() / (targets >= 0).sum(), "hidden_states": others}

    ids, targets = sentences()
    torch.manual_seed(0)
    found, words, stats = trained(Around(Net(), inside), lambda m: m(ids, targets)["loss"])
    torch.manual_seed(0)
    expected, _, of_twin = trained(Around(Net(), logits), lambda m: mean(m(ids), targets))
    assert words == []
    assert stats["B"] == of_twin["B"]
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


def test_a_loss_whose_states_are_not_found_is_no_step_without_a_label():
    """Other states of the same form came later: a gradient arrived, so that something counts."""

    def inside(net, ids, targets):
        loss = fused(net, ids, targets)
        net.tokens(ids)
        return loss

    model = Around(Net(), inside)
    opt = Sophia(model)
    model(*sentences()).backward()
    with pytest.raises(RuntimeError, match="where the predictions are made could not be found"):
        opt.step()


class Dropped(Net):
    """Another function at every call."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def hidden(self, ids):
        return torch.tanh(self.drop(self.tokens(ids)).cumsum(1))


def test_dropout_before_a_loss_outside():
    """The forward that is looked at once more has the dropout that the gradient came through."""
    ids, targets = sentences()
    torch.manual_seed(0)
    model = Around(Dropped(), lambda net, ids: net.hidden(ids))
    _, words, stats = trained(
        model, lambda m: cross_entropy(F.linear(m(ids), m.net.head.weight, m.net.head.bias), targets), steps=4
    )
    assert words == []
    assert (stats["B"], stats["refreshes"]) == (13, 4)


def test_many_losses_are_returned():
    """One fused loss a row, each of them in the loss that is trained."""

    def inside(net, ids, targets):
        pairs = zip(net.hidden(ids).split(1), targets.split(1), strict=True)
        return [Fused.apply(x, net.head.weight, net.head.bias, y, lambda z: z, 0.0).mean() for x, y in pairs]

    ids, targets = sentences((6,) * 8)
    torch.manual_seed(0)
    found, words, stats = trained(Around(Net(), inside), lambda m: sum(m(ids, targets)) / 8, steps=1)
    torch.manual_seed(0)
    expected, _, _ = trained(Around(Net(), logits), lambda m: mean(m(ids), targets), steps=1)
    assert (words, stats["B"]) == ([], 48)
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)
