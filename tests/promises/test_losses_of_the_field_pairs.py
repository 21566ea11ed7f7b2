"""Preference pairs: the prediction is the margin of a pair, and h that of the loss in the margins. Right
where the model returns it, where ``logits_fn`` computes it, and by hand; told elsewhere.
"""

import dataclasses

import pytest
import torch
from curvature_cases import (
    Case,
    Words,
    check_curvature,
    check_told,
    judged,
    mean_estimate,
    per_token,
    rows,
    sentences,
)
from field_cases import check_hutchinson_by_hand, check_sampled_by_hand
from torch import nn
from torch.nn import functional as F

from oracle import gauss_newton
from sophia.likelihoods import Bernoulli, Categorical, Heads

BETA = 0.5
# With one answer a row its own weight and a soft answer look the same: said, and the weights are taken.
UNSURE = r"weight of its own"


def log_p(z, y, mean=False):
    """Of each row's completion: the sum over its tokens, or their mean."""
    counted = y >= 0
    total = -(per_token(z, y) * counted).sum(1)
    return total / counted.sum(1) if mean else total


class Pairs(nn.Module):
    """Margins of pairs: a policy, and what a reference has said of the same texts."""

    def __init__(self, mean=False, both=False):
        super().__init__()
        self.policy, self.mean, self.both = Words(), mean, both

    def forward(self, chosen, chosen_labels, rejected, rejected_labels, reference):
        z = self.policy(chosen)
        difference = log_p(z, chosen_labels, self.mean) - log_p(
            self.policy(rejected), rejected_labels, self.mean
        )
        margin = BETA * (difference - reference)
        # Beside the margin the logits of the chosen texts, as a tensor that the margin is not made of.
        return {"logits": z.clone(), "margin": margin} if self.both else margin


def texts(n=8):
    ids, y = sentences((6, 5, 4, 6, 6, 3, 5, 6)[:n] * 2)
    return ids[:n], y[:n], ids[n:], y[n:], torch.linspace(-1.0, 1.0, n)


def forward(model, data):
    return model(*data)


def dpo(m, data):
    return -F.logsigmoid(m).mean()


def pairs(loss, likelihood="bernoulli", model=Pairs, **settings):
    return Case(model, texts, loss, outputs=forward, settings={"likelihood": likelihood, **settings})


def odds(z, data):
    """ORPO, with the margin in the place of the odds: the chosen text's cross-entropy beside the pair's."""
    return F.cross_entropy(z["logits"].flatten(0, 1), data[1].flatten(), ignore_index=-100) + 0.4 * dpo(
        z["margin"], data
    )


RIGHT = {
    "dpo": pairs(dpo),
    "dpo-sum": pairs(lambda m, d: -F.logsigmoid(m).sum()),
    "dpo-with-unsure-labels": pairs(lambda m, d: -(0.9 * F.logsigmoid(m) + 0.1 * F.logsigmoid(-m)).mean()),
    "dpo-weighted": dataclasses.replace(
        pairs(lambda m, d: -(torch.linspace(0.2, 2.0, 8).to(m) * F.logsigmoid(m)).mean()), warns=UNSURE
    ),
    "simpo": pairs(
        lambda m, d: -F.logsigmoid(m - 0.3).mean(), model=lambda: Pairs(True), logits_fn=lambda m: m - 0.3
    ),
    "ipo": pairs(lambda m, d: (m - 1.0).square().mean(), "gaussian"),
    "orpo": pairs(
        odds,
        Heads({"logits": Categorical(), "margin": Bernoulli()}, weights={"margin": 0.4}),
        lambda: Pairs(both=True),
    ),
}


@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_margins_that_the_model_returns(case):
    """Rows in the place of pairs, or weights of pairs that are lost."""
    check_curvature(case)


def test_a_part_of_the_pairs():
    """Half of the rows in the place of half of the pairs."""
    case = pairs(dpo, fraction=0.25)
    check_curvature(Case(Pairs, texts, dpo, outputs=forward, settings=case.settings, draws=900, spread=2.5))


# ---- reward models: one score a row, chosen rows first


def scorer():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def difference(s):
    return torch.sub(*s.chunk(2))


def ranked(m, data, weight=1.0):
    return -(weight * F.logsigmoid(m)).mean()


WEIGHT = torch.linspace(0.2, 2.0, 8)[:, None]
SCORES = {
    "mean": (ranked, 1 / 8, False),
    "sum": (lambda m, d: ranked(m, d) * 8, 1 / 8, False),
    "whole": (ranked, 1.0, False),
    "weighted": (lambda m, d: ranked(m, d, WEIGHT.to(m)), 1.0, True),
}


@pytest.mark.parametrize(("loss", "fraction", "weighted"), SCORES.values(), ids=SCORES)
def test_scores_of_a_reward_model(loss, fraction, weighted):
    """Scores in the place of pairs, and weights that are read although no gradient comes to the margins."""
    settings = {"likelihood": "bernoulli", "logits_fn": difference, "fraction": fraction}
    warns = None if fraction == 1 else r"not independent"
    warns = UNSURE if weighted else warns
    case = Case(scorer, lambda: rows(16), lambda s, d: loss(difference(s), d), settings=settings, warns=warns)
    torch.manual_seed(0)
    exact = gauss_newton(scorer(), rows(16), lambda m, d: difference(m(d[0])), loss)
    # A pair is told by a shift of both scores, not by the bias of the last layer.
    stats = judged(case, exact, *mean_estimate(case))
    assert stats["B"] == 8


SCORES_TOLD = {
    "by-default": (
        Case(scorer, lambda: rows(16), lambda s, d: ranked(difference(s), d)),
        r"one column.*chunk\(2\)",
    ),
    "as-answers": (
        Case(
            scorer,
            lambda: rows(16),
            lambda s, d: ranked(difference(s), d),
            settings={"likelihood": "bernoulli"},
        ),
        r"pairs of opposite sign.*chunk\(2\)",
    ),
    "as-numbers": (
        Case(
            scorer,
            lambda: rows(16),
            lambda s, d: ranked(difference(s), d),
            settings={"likelihood": "gaussian"},
        ),
        r"pairs of opposite sign.*chunk\(2\)",
    ),
    "margins-as-classes": (Case(Pairs, lambda: texts(4), dpo, outputs=forward), r"margin of a pair"),
    "hinge-of-margins": (pairs(lambda m, d: F.relu(9 - m).mean()), r"straight pieces"),
    "kto": (pairs(lambda m, d: (1 - torch.sigmoid(m)).mean()), r"weight of its own.*hutchinson"),
    "on-the-logits": (
        Case(
            Words,
            lambda: tuple(torch.cat(each) for each in zip(texts()[:2], texts()[2:4], strict=True)),
            lambda z, d: -F.logsigmoid(BETA * difference(log_p(z, d[1]))).mean(),
        ),
        r"likelihood='bernoulli' with a module that returns it.*hp.sampled_loss\(margin\)",
    ),
}


@pytest.mark.parametrize(("case", "words"), SCORES_TOLD.values(), ids=SCORES_TOLD)
def test_pairs_told(case, words):
    """Rows for predictions, in silence."""
    check_told(case, words)


# ---- the ways out, by hand


BY_HAND = {"dpo": (dpo, "bernoulli"), "ipo": (lambda m, d: (m - 1.0).square().mean(), "gaussian")}


@pytest.mark.parametrize(("loss", "likelihood"), BY_HAND.values(), ids=BY_HAND)
def test_margins_by_hand(loss, likelihood):
    """Of any loop: the margin is made inside the pass."""
    check_sampled_by_hand(Pairs, texts(), forward, loss, likelihood)


def test_kto_by_hutchinson():
    """A utility that is no likelihood: the Hessian of the loss itself."""

    def utility(model, data):
        return (1 - torch.sigmoid(model(*data))).mean()

    check_hutchinson_by_hand(Pairs, texts(), utility, count=8)
