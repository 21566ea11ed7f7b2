"""Models that return their loss and no logits, compiled or not; each is held to its twin (``twins.py``), and
some to the oracle as well.
"""

import pytest
import torch
import torch.utils.checkpoint
from curvature_cases import Case, cross_entropy, judged, mean_estimate, sentences
from torch import nn
from torch.nn import functional as F
from twins import Around, Net, check_twins, logits, mean, trained

from oracle import gauss_newton
from sophia import Sophia
from sophia.likelihoods import Distillation

# ---- the loss alone ----


def plain(net, ids, targets):
    return mean(net(ids), targets)


def half_the_sum(z, targets):
    return 0.5 * cross_entropy(z, targets, reduction="sum")


def smoothed(z, targets):
    return cross_entropy(z, targets, label_smoothing=0.1)


def cap(z):
    return 2 * torch.tanh(z / 2)


def classes_second(net, ids, targets):
    return F.cross_entropy(net(ids).transpose(1, 2), targets)


def shifted(z, targets):
    return cross_entropy(z[:, :-1], targets[:, 1:])


def by_hand(net, ids, targets):
    kept = targets >= 0
    return -net(ids).log_softmax(-1)[kept].gather(1, targets[kept][:, None]).mean()


def checkpointed(net, ids, targets):
    def loss(x):
        return cross_entropy(net.head(x), targets)

    return torch.utils.checkpoint.checkpoint(loss, net.hidden(ids), use_reentrant=False)


def with_other_things(net, ids, targets):
    return {"loss": plain(net, ids, targets), "logits": None, "tokens": targets.numel()}["loss"]


ALONE = {
    "mean": (plain, logits, mean),
    "half the sum": (lambda net, x, y: half_the_sum(net(x), y), logits, half_the_sum),
    "smoothed": (lambda net, x, y: smoothed(net(x), y), logits, smoothed),
    "capped": (lambda net, x, y: mean(cap(net(x)).float(), y), lambda net, x: cap(net(x)), mean),
    "classes second": (classes_second, logits, mean),
    "shifted": (lambda net, x, y: shifted(net(x), y), lambda net, x: net(x), shifted),
    "log_softmax by hand": (by_hand, logits, mean),
    "checkpointed": (checkpointed, logits, mean),
}


def many_chunks(net, ids, targets):
    pairs = zip(net.hidden(ids).flatten(0, 1).split(1), targets.flatten().split(1), strict=True)
    return sum(cross_entropy(net.head(x), y, reduction="sum") for x, y in pairs) / targets.numel()


def test_a_loss_of_many_chunks():
    """One chunk a token: all of them count."""
    ids, targets = sentences((6,) * 16)
    torch.manual_seed(0)
    _, words, stats = trained(Around(Net(), many_chunks), lambda m: m(ids, targets))
    assert (words, stats["B"]) == ([], 96)


@pytest.mark.parametrize("name", [name for name in ALONE if name != "shifted"])
def test_a_model_that_returns_its_loss_alone(name):
    check_twins(*ALONE[name])


def test_a_loss_for_each_token():
    def of_tokens(net, ids, targets):
        return cross_entropy(net(ids), targets, reduction="none").view(targets.shape)

    ids, targets = sentences()
    torch.manual_seed(0)
    found, words, _ = trained(
        Around(Net(), of_tokens), lambda m: m(ids, targets).sum() / (targets >= 0).sum()
    )
    torch.manual_seed(0)
    expected, _, _ = trained(Around(Net(), logits), lambda m: mean(m(ids), targets))
    assert words == []
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


def chunks(net, ids, targets):
    hidden, losses = net.hidden(ids), []
    for x, y in zip(hidden.split(2, 1), targets.split(2, 1), strict=True):
        losses.append(cross_entropy(net.head(x), y, reduction="sum"))
    return sum(losses) / (targets >= 0).sum()


@pytest.mark.parametrize(
    ("forward", "loss", "fraction"),
    [
        (ALONE["half the sum"][0], half_the_sum, 1.0),
        (chunks, mean, 1.0),
        (plain, mean, 0.25),
        (ALONE["shifted"][0], shifted, 0.25),
        (chunks, mean, 0.25),
    ],
    ids=["sum", "chunks", "mean-quarter", "shifted-quarter", "chunks-quarter"],
)
def test_against_the_oracle(forward, loss, fraction):
    """Whole, and a quarter of the rows, drawn anew at each refresh."""

    def data():
        return sentences((6, 4, 2, 1) if fraction == 1 else (6,) * 8)

    def small():
        return Net(width=5)

    case = Case(
        lambda: Around(small(), forward),
        data,
        lambda output, data: output,
        outputs=lambda model, data: model(*data),
        settings={"fraction": fraction},
        draws=400 if fraction == 1 else 1200,
        spread=1.5 if fraction == 1 else 3.0,
    )
    torch.manual_seed(0)
    exact = gauss_newton(small(), data(), lambda net, d: net(d[0]), lambda z, d: loss(z, d[1]))
    stats = judged(case, {f"net.{name}": e for name, e in exact.items()}, *mean_estimate(case))
    assert stats["share"] == pytest.approx(fraction)


def test_micro_batches_and_a_loss_divided_by_hand():
    ids, targets = sentences((6,) * 8)
    results = []
    for alone in (True, False):
        torch.manual_seed(0)
        model = Around(Net(), plain if alone else logits)

        def loss(m, alone=alone):
            pairs = zip(ids.split(2), targets.split(2), strict=True)
            return sum((m(x, y) if alone else mean(m(x), y)) / 4 for x, y in pairs)

        results.append(trained(model, loss, fraction=0.5))
    (found, words, stats), (expected, _, _) = results
    assert (words, stats["share"]) == ([], 0.5)
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


# ---- with the loss inside a compiled graph ----


@pytest.mark.parametrize("name", ["mean", "half the sum", "capped"])
def test_a_compiled_model_that_returns_its_loss_alone(name):
    """The graph shows nothing, so a forward outside of it is read; the model is compiled once."""
    inside, outside, loss = ALONE[name]
    ids, targets = sentences()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Around(Net(), inside)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    counters = torch._dynamo.utils.counters
    counters.clear()
    found, words, _ = trained(model, lambda m: compiled(ids, targets), fraction=0.25, steps=4)
    frames = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    again = torch.compile(twin := Around(Net(), inside), backend="aot_eager")
    for _ in range(4):
        again(ids, targets).backward()
    assert frames == counters["stats"]["unique_graphs"]
    torch.manual_seed(0)
    expected, _, _ = trained(Around(Net(), outside), lambda m: loss(m(ids), targets), fraction=0.25, steps=4)
    assert words == []
    assert len(found) == len(dict(twin.named_parameters()))
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


BESIDE = {
    "sum": lambda z, y: cross_entropy(z, y, reduction="sum"),
    "doubled": lambda z, y: 2 * mean(z, y),
    "smoothed": smoothed,
    "mean": mean,
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_compiled_model_that_returns_logits_and_its_loss(name):
    """No gradient reaches these logits, and the loss is not always their mean cross-entropy."""
    ids, targets = sentences()
    loss = BESIDE[name]

    def inside(net, ids, targets):
        z = net(ids)
        return z, loss(z, targets)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Around(Net(), inside)
    compiled = torch.compile(model, backend="aot_eager")
    found, words, stats = trained(model, lambda m: compiled(ids, targets)[1] / 3)
    torch.manual_seed(0)
    expected, _, of_twin = trained(Around(Net(), logits), lambda m: loss(m(ids), targets) / 3)
    assert words == []
    assert stats["B"] == of_twin["B"]
    for key, h in expected.items():
        torch.testing.assert_close(found[key], h, rtol=1e-3, atol=1e-6)


# ---- several softmaxes, other losses, logits that are only looked at ----


def test_logits_returned_to_be_looked_at():
    """Detached beside the loss: nothing could be propagated from them."""

    def inside(net, ids, targets):
        z = net(ids)
        return {"loss": mean(z, targets), "logits": z.detach()}

    ids, targets = sentences()
    torch.manual_seed(0)
    found, words, _ = trained(Around(Net(), inside), lambda m: m(ids, targets)["loss"])
    torch.manual_seed(0)
    expected, _, _ = trained(Around(Net(), logits), lambda m: mean(m(ids), targets))
    assert words == []
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


class Routed(Net):
    """A router whose entropy is a penalty."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(12, 3)

    def routed(self, ids):
        hidden = self.hidden(ids)
        shares = self.router(hidden).log_softmax(-1)
        return self.head(hidden * (1 + shares.exp()[..., :1])), shares


def test_the_entropy_of_a_router_is_left_out():
    """Its softmax is no prediction, and took the weights of those that are."""

    def inside(net, ids, targets):
        z, shares = net.routed(ids)
        return mean(z, targets) + 0.1 * (shares.exp() * shares).sum(-1).mean()

    ids, targets = sentences()
    torch.manual_seed(0)
    found, words, stats = trained(Around(Routed(), inside), lambda m: m(ids, targets), steps=2, lr=0.0)
    assert len(words) == 1
    assert "a softmax over 3 classes" in words[0]
    torch.manual_seed(0)
    twin = Around(Routed(), lambda net, ids: net.routed(ids)[0])
    expected, _, of_twin = trained(twin, lambda m: mean(m(ids), targets), steps=2, lr=0.0)
    assert stats["B"] == of_twin["B"]
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-3, atol=1e-6)


def test_a_value_head_inside_is_told():
    def inside(net, ids, targets):
        hidden = net.hidden(ids)
        return (
            mean(net.head(hidden), targets)
            + hidden.mean(-1).sub(1).square().mean()
            + F.mse_loss(hidden.sum(-1), targets.float())
        )

    ids, targets = sentences()
    torch.manual_seed(0)
    _, words, _ = trained(Around(Net(), inside), lambda m: m(ids, targets))
    assert len(words) == 1
    assert "MseLoss" in words[0]
    assert "Heads" in words[0]


def test_a_teacher_inside_is_told():
    """Its two softmaxes are of one prediction, and would be counted twice."""
    ids, targets = sentences()
    torch.manual_seed(0)
    teacher = torch.randn(4, 6, 7).softmax(-1)

    def inside(net, ids, targets):
        z = net(ids)
        soft = F.kl_div((z / 2).log_softmax(-1), teacher, reduction="batchmean")
        return mean(z, targets) + 0.5 * 4 * soft

    model = Around(Net(), inside)
    opt = Sophia(model, likelihood=Distillation(2.0, hard=1.0, soft=0.5))
    model(ids, targets).backward()
    with pytest.raises(RuntimeError, match=r"returns its loss, one number.*Let it return the logits"):
        opt.step()


def test_reentrant_checkpointing_around_the_loss_is_told():
    def inside(net, ids, targets):
        def loss(x):
            return cross_entropy(net.head(x), targets)

        return torch.utils.checkpoint.checkpoint(loss, net.hidden(ids), use_reentrant=True)

    ids, targets = sentences()
    model = Around(Net(), inside)
    opt = Sophia(model)
    model(ids, targets).backward()
    with pytest.raises(RuntimeError, match=r"take use_reentrant=False"):
        opt.step()
