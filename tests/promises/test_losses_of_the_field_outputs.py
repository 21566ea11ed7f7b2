"""Several heads and positions, routers, policies and weights that no gradient tells."""

import pytest
import torch
from curvature_cases import (
    ONE_STEP,
    Case,
    Words,
    check_curvature,
    check_told,
    classifier,
    cross_entropy,
    mean_estimate,
    outcome,
    rows,
    sentences,
)
from field_cases import check_hutchinson_by_hand, check_sampled_by_hand, exact_hessian
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.curvature import Hutchinson
from sophia.likelihoods import Categorical, Gaussian, Heads

PART = {"fraction": 0.25}


def generator():
    return torch.Generator().manual_seed(3)


# ---- several positions ahead; the start and the end of an answer


class Ahead(nn.Module):
    """Three heads, for the next token, the one after it, and the third."""

    def __init__(self, form):
        super().__init__()
        self.tokens, self.form = nn.Embedding(7, 4), form
        self.heads = nn.ModuleList(nn.Linear(4, 7) for _ in range(3))

    def forward(self, ids):
        hidden = torch.tanh(self.tokens(ids).cumsum(1))
        return self.form([head(hidden) for head in self.heads])


def of_all(heads, data):
    return sum(
        0.5**k * cross_entropy(z[:, : z.shape[1] - k], data[1][:, k:], ignore_index=-100)
        for k, z in enumerate(heads)
    )


AHEAD = {
    "tuple": (tuple, lambda z: z),
    "list": (list, lambda z: z),
    "named": (lambda z: {"logits": z[0], "ahead": z[1:]}, lambda z: [z["logits"], *z["ahead"]]),
    "stacked": (lambda z: torch.stack(z, 2), lambda z: z.unbind(2)),
    "heads-first": (lambda z: torch.stack(z, 1), lambda z: z.unbind(1)),
}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(("form", "parts"), AHEAD.values(), ids=AHEAD)
def test_tokens_ahead(form, parts, fraction):
    """A head that is left out, or a factor of one for all."""
    more = {} if fraction == 1 else {"draws": 600, "spread": 2.2}
    case = Case(
        lambda: Ahead(form),
        sentences,
        lambda z, d: of_all(parts(z), d),
        settings={"fraction": fraction},
        **more,
    )
    check_curvature(case)


class Span(nn.Module):
    """Logits of an answer's first and last token."""

    def __init__(self, named=False):
        super().__init__()
        self.tokens, self.ends, self.named = nn.Embedding(7, 4), nn.Linear(4, 2), named

    def forward(self, ids):
        start, end = self.ends(torch.tanh(self.tokens(ids).cumsum(1))).unbind(-1)
        return {"start_logits": start, "end_logits": end} if self.named else (start, end)


def questions():
    ids, _ = sentences((6,) * 8)
    return ids, *(torch.randint(0, 6, (8,), generator=generator()) for _ in range(2))


def of_span(z, data):
    start, end = z.values() if isinstance(z, dict) else z
    return (F.cross_entropy(start, data[1]) + F.cross_entropy(end, data[2])) / 2


SPAN = {"likelihood": Heads({"start_logits": Categorical(), "end_logits": Categorical()})}
ENDS = {
    "tuple": Case(Span, questions, of_span),
    "named": Case(lambda: Span(True), questions, of_span, settings=SPAN),
    "named-in-part": Case(
        lambda: Span(True), questions, of_span, settings={**SPAN, **PART}, draws=600, spread=2.2
    ),
}


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_ends_of_an_answer(case):
    """One of two outputs alone."""
    check_curvature(case)


def test_ends_by_name_are_told():
    """Which fields there are, and what to write of them."""
    check_told(Case(lambda: Span(True), questions, of_span), r"start_logits, end_logits.*Heads")


def test_a_class_for_each_token():
    """Padding, and weights of classes."""

    def loss(z, data):
        return cross_entropy(z, data[1], ignore_index=-100, weight=torch.linspace(0.5, 2.0, 7).to(z))

    check_curvature(Case(Words, sentences, loss))


# ---- routers


class Experts(nn.Module):
    """Three experts, and a loss that keeps their shares even."""

    def __init__(self, with_loss=False):
        super().__init__()
        self.router, self.with_loss = nn.Linear(4, 3), with_loss
        self.experts = nn.ModuleList(classifier(4, 5, 5) for _ in range(3))

    def forward(self, x, labels=None):
        gates = torch.softmax(self.router(x), -1)
        logits = (gates[..., None] * torch.stack([e(x) for e in self.experts], -2)).sum(-2)
        even = 0.5 * 3 * gates.mean(0).square().sum()
        if labels is None:
            return {"logits": logits, "even": even}
        return {"loss": F.cross_entropy(logits, labels) + even, "logits": logits}


def test_a_routers_own_loss_is_not_in_gauss_newton():
    """H of the predictions alone, as the page says: a penalty has no likelihood."""

    def trained(z, data):
        return F.cross_entropy(z["logits"], data[1]) + z["even"]

    case = Case(Experts, rows, trained)
    found, words, _ = mean_estimate(case)
    exact = Case(
        Experts, rows, lambda z, d: F.cross_entropy(z, d[1]), outputs=lambda m, d: m(d[0])["logits"]
    ).exact()
    assert not words
    assert max(float((found[n] - e).norm() / e.norm()) for n, e in exact.items()) < 0.32


def test_a_routers_own_loss_is_in_hutchinsons_h():
    """The router's h at an eighth of the rows: equal rows, so that a part of them is as good as all."""
    torch.manual_seed(0)
    model = Experts()
    x, y = (each[:1].expand(16, *each.shape[1:]).contiguous() for each in rows())
    opt = Sophia(model, estimator=Hutchinson(), **ONE_STEP)
    draws, total, squares = 400, 0.0, 0.0
    for _ in range(draws):
        model(x, y)["loss"].backward()
        opt.step()
        opt.zero_grad()
        h = opt.state[model.router.weight]["hessian"].double()
        total, squares = total + h, squares + h.square()
    mean = total / draws
    error = ((squares / draws - mean.square()).clamp(min=0) / draws).sqrt()
    exact = exact_hessian(model, (x, y), lambda m, d: m(*d)["loss"])["router.weight"]
    without = exact_hessian(model, (x, y), lambda m, d: F.cross_entropy(m(d[0])["logits"], d[1]))[
        "router.weight"
    ]
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5).all())
    assert float((exact - without).norm()) > 0.1 * float(exact.norm())  # it is not left out by chance
    assert opt.stats()["share"] == 1 / 8


# ---- policies


def advantages(data):
    return torch.linspace(-1.0, 1.5, len(data[1])).to(data[0])


def clipped(z, data):
    """PPO, at a policy that has moved a little from the one that acted."""
    log_p = -F.cross_entropy(z, data[1], reduction="none")
    ratio = (log_p - log_p.detach() + 0.05 * torch.tanh(data[0][:, 0])).exp()
    return -torch.minimum(ratio * advantages(data), ratio.clamp(0.8, 1.2) * advantages(data)).mean()


def grouped(z, data):
    """GRPO: advantages within a group, and a divergence from a reference."""
    log_p = -F.cross_entropy(z, data[1], reduction="none")
    off = -0.1 * torch.ones_like(log_p) - log_p + log_p.detach()
    return -((log_p - log_p.detach()).exp() * advantages(data) - 0.04 * (off.exp() - off - 1)).mean()


POLICIES = {"ppo": clipped, "grpo": grouped}


@pytest.mark.parametrize("loss", POLICIES.values(), ids=POLICIES)
def test_policies_told(loss):
    """A curvature made of the positive advantages alone, in silence."""
    check_told(Case(classifier, rows, loss), r"advantages.*hp\.sampled_loss\(logits, mask\).*hp\.add")


@pytest.mark.parametrize("loss", POLICIES.values(), ids=POLICIES)
def test_policies_by_hutchinson(loss):
    """The Hessian of the loss."""
    check_hutchinson_by_hand(classifier, rows(), lambda m, d: loss(m(d[0]), d), count=13)


def test_policies_by_their_fisher_matrix():
    """Of the policy, whatever the advantages are: that of a cross-entropy."""
    check_sampled_by_hand(
        classifier, rows(), lambda m, d: m(d[0]), lambda z, d: F.cross_entropy(z, d[1]), "categorical"
    )


# ---- weights of squared errors, which no gradient tells: min-SNR and the like


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = classifier(5, 6, 4)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


def noisy():
    return torch.randn(16, 4, generator=generator()), torch.rand(16, generator=generator())


def by_time(t):
    return (5 * t + 0.1)[:, None]


def weighted(z, data):
    return (by_time(data[1]) * (z - data[0]).square()).mean()


def stated(args, kwargs, output):
    return by_time(args[1]).expand_as(output)


def run(model, data):
    return model(*data)


WEIGHTED = {"likelihood": "gaussian", "mask_fn": stated}
STATED = {
    "whole": Case(Denoiser, noisy, weighted, outputs=run, settings=WEIGHTED),
    "part": Case(
        Denoiser, noisy, weighted, outputs=run, settings={**WEIGHTED, **PART}, draws=1000, spread=3.0
    ),
    "classes": Case(
        classifier,
        rows,
        lambda z, d: (torch.linspace(0.1, 3.0, 13).to(z) * F.cross_entropy(z, d[1], reduction="none")).mean(),
        settings={"mask_fn": lambda args, kwargs, output: torch.linspace(0.1, 3.0, 13)},
    ),
}


@pytest.mark.parametrize("case", STATED.values(), ids=STATED)
def test_weights_that_the_user_states(case):
    """Numbers taken for a mask, or those of other rows than the ones that are run."""
    check_curvature(case)


def test_weights_stated_over_two_micro_batches():
    """The weights of the last micro-batch for all."""

    def loop(model, opt, data, case):
        for share, rows_of in ((0.25, slice(0, 4)), (0.75, slice(4, 16))):
            part = tuple(each[rows_of] for each in data)
            (share * weighted(model(*part), part)).backward()
        opt.step()

    check_curvature(Case(Denoiser, noisy, weighted, outputs=run, settings=WEIGHTED, loop=loop))


def test_weights_by_hand():
    """The same in a pass by hand."""
    data = noisy()
    weights = by_time(data[1]).expand(16, 4)
    check_sampled_by_hand(Denoiser, data, run, weighted, "gaussian", mask=weights)


def test_a_sigma_for_rows_that_are_not_run():
    """A shape that fails somewhere below, or is stretched."""
    likelihood = Gaussian(lambda: by_time(noisy()[1]))
    case = Case(Denoiser, noisy, weighted, outputs=run, settings={"likelihood": likelihood, **PART})
    raised, _ = outcome(lambda: mean_estimate(case))
    assert raised is not None
    assert "mask_fn=" in raised


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_weights_below_zero_are_refused(weight):
    """The root of a negative number, as NaN in h."""
    settings = {"mask_fn": lambda args, kwargs, output: torch.full((13,), weight)}
    case = Case(classifier, rows, lambda z, d: F.cross_entropy(z, d[1]), settings=settings)
    check_told(case, r"below zero.*hutchinson", kind="error")
