"""The function run again is the function that was trained, and the refresh leaves no trace in what it runs:
restored, or refused with the reason.
"""

import pytest
import torch
from curvature_cases import (
    Case,
    check_curvature,
    check_curvature_or_told,
    check_told,
    classifier,
    mean_estimate,
    outcome,
    rows,
)
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from said import said
from sophia import Sophia


def plain(z, data):
    return F.cross_entropy(z, data[1])


# ---- other parameters than the model's own ----


def perturbed(model, data):
    """The loss at other weights, whose gradient comes home to the model's own."""
    moved = {name: 3 * p for name, p in model.named_parameters()}
    return functional_call(model, moved, (data[0],))


def adapted(model, data):
    """One step of MAML: the weights after a gradient step on other labels, through which the loss goes."""
    named = dict(model.named_parameters())
    inner = F.cross_entropy(functional_call(model, named, (data[0],)), data[1].flip(0))
    slopes = torch.autograd.grad(inner, list(named.values()), create_graph=True)
    moved = {name: p - 2.0 * g for (name, p), g in zip(named.items(), slopes, strict=True)}
    return functional_call(model, moved, (data[0],))


OTHERS = r"functional_call|other parameters|not its own|parameters"


@pytest.mark.parametrize("outputs", [perturbed, adapted], ids=["replay-perturbed-weights", "replay-adapted"])
def test_other_parameters_are_replayed_or_refused(outputs):
    """Run again with the module's own weights: the curvature of another point."""
    check_curvature_or_told(Case(classifier, rows, plain, outputs=outputs), OTHERS)


def test_replay_own_parameters_by_functional_call():
    """A false alarm where the parameters handed in are the model's own."""
    own = lambda m, data: functional_call(m, dict(m.named_parameters()), (data[0],))
    check_curvature(Case(classifier, rows, plain, outputs=own, draws=400))


def test_replay_parameters_changed_since_the_forward():
    """A forward at weights that are gone (put back by the loop after the backward)."""

    def loop(model, opt, data, case):
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        plain(model(data[0]), data).backward()
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
        opt.step()

    tripled = lambda m, data: functional_call(
        m, {n: 3 * p.detach() + (p - p.detach()) for n, p in m.named_parameters()}, (data[0],)
    )
    check_curvature_or_told(Case(classifier, rows, plain, outputs=tripled, loop=loop), r"parameters|weights")


# ---- state that the forward moves ----


class Moving(nn.Module):
    """Normalised by a moving average that is kept in ``kind`` of place."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = classifier(), kind
        if kind == "parameter":
            self.average = nn.Parameter(torch.zeros(4), requires_grad=False)
        elif kind == "buffer":
            self.register_buffer("average", torch.zeros(4))
        elif kind == "list":
            self.average = None
            self.kept = [torch.zeros(4)]
        else:
            self.average = torch.zeros(4)

    def forward(self, x):
        average = self.kept[0] if self.kind == "list" else self.average
        if self.training:
            if self.kind == "replaced":
                self.average = average = 0.9 * average + 0.1 * x.mean(0)
            else:
                with torch.no_grad():
                    average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.net(x - average.detach())


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute", "replaced", "list"])
def test_replay_moving_state_is_restored_or_refused(kind):
    """Moving statistics that move twice on due steps, where they are no buffers."""
    after = []
    for every in (1, 1000):
        torch.manual_seed(0)
        model, (x, y) = Moving(kind), rows()
        # All rows: the average is taken over them, so they are not independent, which would be said
        opt = Sophia(model, lr=0.0, weight_decay=0.0, update_every=every, fraction=1.0)

        def run(model=model, opt=opt, x=x, y=y):
            for _ in range(4):
                F.cross_entropy(model(x), y).backward()
                opt.step()
                opt.zero_grad()

        raised, heard = outcome(run)
        told = any("state" in words for words in [*heard, str(raised)])
        if told and kind not in ("buffer", "parameter"):  # those two can be restored
            return
        assert raised is None
        assert not heard
        after.append((model.kept[0] if kind == "list" else model.average).detach().clone())
    assert torch.equal(*after)


def test_replay_counter_that_changes_the_function():
    """A model that does another thing at every call."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = classifier(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) * (1 + self.calls % 2 * 3)

    # The training forward is always an odd call where a refresh leaves the counter alone
    def loop(model, opt, data, case):
        model.calls = 0
        plain(model(data[0]), data).backward()
        opt.step()

    check_curvature_or_told(Case(Counting, rows, plain, loop=loop), r"state|repeat|same|function")


def test_replay_inputs_that_carry_a_graph():
    """Gradients of the refresh in the encoder whose output the model reads."""
    torch.manual_seed(0)
    encoder, model, (x, y) = nn.Linear(4, 4), classifier(), rows()
    opt = Sophia(model, update_every=1, fraction=1.0)
    assert not said(lambda: (F.cross_entropy(model(encoder(x)), y).backward(), opt.step()))
    torch.manual_seed(0)
    fresh = nn.Linear(4, 4), classifier()
    F.cross_entropy(fresh[1](fresh[0](x)), y).backward()
    assert torch.equal(encoder.weight.grad, fresh[0].weight.grad)


# ---- hooks of users ----


def test_replay_tensor_hooks_on_parameters_do_not_see_the_refresh():
    """A recorder of gradients that is shown sampled ones, five times larger, and twice a step."""
    seen = []
    for every in (1, 1000):
        torch.manual_seed(0)
        model, (x, y) = classifier(), rows()
        seen.append([])
        for p in model.parameters():
            p.register_hook(lambda g, at=seen[-1]: at.append(g.clone()))
        opt = Sophia(model, lr=0.0, weight_decay=0.0, update_every=every, fraction=1.0)
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    assert len(seen[0]) == len(seen[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_replay_tensor_hooks_that_change_gradients():
    """A hook that halves the gradient of a tensor quarters its curvature."""

    def hooked():
        model = classifier()
        model[0].weight.register_hook(lambda g: g / 2)
        return model

    free, halved = (mean_estimate(Case(build, rows, plain, draws=3))[0] for build in (classifier, hooked))
    torch.testing.assert_close(free["0.weight"], halved["0.weight"])


# ---- per-sample gradients ----


class PerSample(nn.Module):
    """What wrappers for private training do: a gradient for every row is left on the parameters."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 5)
        self.net.register_forward_hook(self._listen)

    @staticmethod
    def _listen(module, args, output):
        def keep(gradient):
            module.weight.grad_sample = torch.einsum("bi,bj->bij", gradient, args[0])
            module.bias.grad_sample = gradient.clone()

        output.register_hook(keep)

    def forward(self, x):
        return self.net(x)


def test_replay_per_sample_gradients_are_refused():
    """H from raw rows, outside of the accountant, and ``grad_sample`` overwritten with sampled ones."""
    check_told(Case(PerSample, rows, plain), r"grad_sample|per.sample|per.example|privacy", kind="error")


def test_replay_vmap_of_grad_is_told_or_works():
    """An error of torch's from inside a hook of ours."""

    def loop(model, opt, data, case):
        own = dict(model.named_parameters())

        def loss(parameters, x, y):
            return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

        slopes = vmap(grad(loss), in_dims=(None, 0, 0))({n: p.detach() for n, p in own.items()}, *data)
        for name, p in own.items():
            p.grad = slopes[name].mean(0)
        opt.step()

    check_told(
        Case(classifier, rows, plain, loop=loop), r"per.sample|per.example|hessian_pass|manual", kind="error"
    )


# ---- Hutchinson and losses of which a part is divided by something else ----


class Router(nn.Module):
    """Like a mixture of experts of transformers: ``num_items_in_batch`` divides the cross-entropy alone."""

    def __init__(self):
        super().__init__()
        self.net, self.router = classifier(), nn.Parameter(torch.ones(3))

    def forward(self, x, labels=None, num_items_in_batch=None):
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss + self.router.square().sum(), "logits": logits}


@pytest.mark.parametrize("fraction", [1.0, 1 / 8])
def test_replay_hutchinson_and_a_router_loss(fraction):
    """The router's h 8 times too large at an eighth of the rows, where its Hessian is 2 exactly; that of the
    cross-entropy 8 times too small, as two rows are divided by the number of all.
    """
    case = Case(
        Router,
        lambda: rows(16),
        lambda z, data: z["loss"],
        outputs=lambda m, data: m(data[0], labels=data[1], num_items_in_batch=16),
        settings={"estimator": "hutchinson", "fraction": fraction},
    )
    found, _, _ = mean_estimate(case)
    torch.testing.assert_close(found["router"], torch.full((3,), 2.0, dtype=torch.float64))
    torch.manual_seed(0)
    p = torch.softmax(Router().net(rows(16)[0]), -1).detach()
    assert float(found["net.2.bias"].sum() / (p * (1 - p)).mean(0).sum()) == pytest.approx(1, abs=0.25)
