"""Embeddings that a loss compares: in-batch contrast in one direction and in both, over one forward and over
two, and distances of triplets. The classes of a contrast are the batch, so micro-batches are run whole.
"""

import pytest
import torch
from curvature_cases import Case, check_told, classifier, judged, mean_estimate, rows
from field_cases import check_hutchinson_by_hand, check_sampled_by_hand
from torch import nn
from torch.nn import functional as F

from oracle import gauss_newton
from sophia.likelihoods import Categorical, Heads


class Towers(nn.Module):
    """Embeddings of both sides, in one forward; the scale is learned, as usual."""

    def __init__(self, normal=False, named=False):
        super().__init__()
        self.image, self.text = classifier(4, 6, 5), classifier(4, 6, 5)
        self.scale, self.normal, self.named = nn.Parameter(torch.tensor(1.6)), normal, named

    def forward(self, image, text):
        a, b = self.image(image), self.text(text)
        if self.normal:
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return {"image": a, "text": b} if self.named else (a, b)


class One(nn.Module):
    """One tower."""

    def __init__(self):
        super().__init__()
        self.net = classifier(4, 6, 5)

    def forward(self, x):
        return self.net(x)


def sides(data):
    return data[0], data[0] + 0.1 * data[0].flip(1)


def similarities(z):
    a, b = (z["image"], z["text"]) if isinstance(z, dict) else z
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.2


def places(s):
    return torch.arange(len(s))


def one_way(s, data=None):
    return F.cross_entropy(s, places(s))


def both_ways(s, data=None):
    return (F.cross_entropy(s, places(s)) + F.cross_entropy(s.T, places(s))) / 2


def queue(s, data=None):
    """The positive first, as where old keys stand beside."""
    return F.cross_entropy(s, torch.zeros(len(s), dtype=torch.long))


BOTH = {
    "likelihood": Heads({"image": Categorical(), "text": Categorical()}, weights={"image": 0.5, "text": 0.5}),
    "logits_fn": lambda z: {"image": similarities(z), "text": similarities(z).T},
}
ONE = {"logits_fn": similarities}
ONE_FORWARD = {
    "one-way": (one_way, ONE, Towers),
    "one-way-normalised": (one_way, ONE, lambda: Towers(True)),
    "one-way-named": (one_way, ONE, lambda: Towers(named=True)),
    "one-way-times-three": (lambda s, d: 3 * one_way(s), ONE, Towers),
    "one-way-sum": (lambda s, d: F.cross_entropy(s, places(s), reduction="sum"), ONE, Towers),
    "both-ways": (both_ways, BOTH, Towers),
    "both-ways-summed": (lambda s, d: 2 * both_ways(s), BOTH, Towers),
    "first-place": (queue, ONE, Towers),
}


@pytest.mark.parametrize(("loss", "settings", "make"), ONE_FORWARD.values(), ids=ONE_FORWARD)
def test_contrast_of_one_forward(loss, settings, make):
    """A factor of the loss that is lost, a direction left out, or words without a cause."""
    case = Case(
        make,
        rows,
        lambda z, d: loss(similarities(z), d),
        outputs=lambda m, d: m(*sides(d)),
        settings={**settings, "fraction": 0.25},
        warns=r"not independent",
    )
    torch.manual_seed(0)
    exact = gauss_newton(make(), rows(), lambda m, d: similarities(m(*sides(d))), loss)
    stats = judged(case, exact, *mean_estimate(case))
    assert stats["B"] == (26 if settings is BOTH else 13)


def test_contrast_of_smoothed_places_is_a_mean():
    """Weights that are not read, said once at most: they are those of a mean."""
    loss = Case(
        Towers,
        rows,
        lambda z, d: F.cross_entropy(similarities(z), places(z[0]), label_smoothing=0.1),
        outputs=lambda m, d: m(*sides(d)),
        settings=ONE,
        warns=r"counting every position",
    )
    torch.manual_seed(0)
    exact = gauss_newton(Towers(), rows(), lambda m, d: similarities(m(*sides(d))), one_way)
    judged(loss, exact, *mean_estimate(loss))


def two_forwards(model, data):
    return [model(x) for x in sides(data)]


def of_embeddings(loss):
    return lambda z, data: loss(similarities(z), data)


def soft_triplet(z, data):
    """log(1 + exp(distance to the positive - distance to the negative))."""
    anchor, positive, negative = z
    return F.softplus((anchor - positive).square().sum(1) - (anchor - negative).square().sum(1)).mean()


def three(model, data):
    return [model(x) for x in (data[0], data[0] + 0.1, data[0].flip(0))]


TOLD = {
    "two-forwards": (
        Case(One, rows, of_embeddings(one_way), outputs=two_forwards),
        r"sampled_loss\(similarities\)",
    ),
    "two-forwards-both-ways": (
        Case(One, rows, of_embeddings(both_ways), outputs=two_forwards),
        r"once for each direction",
    ),
    "one-forward": (
        Case(Towers, rows, of_embeddings(one_way), outputs=lambda m, d: m(*sides(d))),
        r"logits_fn=, a function from the output to the similarities",
    ),
    "one-forward-normalised": (
        Case(lambda: Towers(True), rows, of_embeddings(one_way), outputs=lambda m, d: m(*sides(d))),
        r"logits_fn=, a function from the output to the",
    ),
    "triplet": (
        Case(One, rows, lambda z, d: F.triplet_margin_loss(*z), outputs=three),
        r"triplet.*hutchinson",
    ),
    "soft-triplet": (Case(One, rows, soft_triplet, outputs=three), r"triplet.*hutchinson"),
    "cosine": (
        Case(
            One,
            rows,
            lambda z, d: F.cosine_embedding_loss(*z, torch.ones(13)),
            outputs=two_forwards,
        ),
        r"hutchinson",
    ),
}


@pytest.mark.parametrize(("case", "words"), TOLD.values(), ids=TOLD)
def test_comparisons_told(case, words):
    """Embeddings taken for logits; advice that leads in a circle."""
    check_told(case, words, kind="error")


# ---- the ways out, by hand


@pytest.mark.parametrize("both", [False, True], ids=["one-way", "both-ways"])
def test_contrast_of_two_forwards_by_hand(both):
    """One call for each direction: a mean over both."""
    check_sampled_by_hand(
        One,
        rows(),
        lambda m, d: similarities(two_forwards(m, d)),
        both_ways if both else one_way,
        "categorical",
        split=(lambda s: [s, s.T]) if both else (lambda s: [s]),
    )


def test_soft_triplet_by_hand():
    """As a yes-or-no answer: which of the two distances is smaller."""

    def margins(model, data):
        anchor, positive, negative = three(model, data)
        return (anchor - negative).square().sum(1) - (anchor - positive).square().sum(1)

    check_sampled_by_hand(One, rows(), margins, lambda m, d: F.softplus(-m).mean(), "bernoulli")


TRIPLETS = {"hard": lambda z, d: F.triplet_margin_loss(*z), "soft": soft_triplet}


@pytest.mark.parametrize("loss", TRIPLETS.values(), ids=TRIPLETS)
def test_triplets_by_hutchinson(loss):
    """The Hessian of the loss itself."""
    check_hutchinson_by_hand(One, rows(), lambda m, d: loss(three(m, d), d), count=13)


def test_contrast_with_other_labels_is_told():
    """Labels that are no places in the batch, with a factor that nobody has read."""

    def permuted(s, data):
        return 3 * F.cross_entropy(s, places(s).flip(0))

    case = Case(Towers, rows, of_embeddings(permuted), outputs=lambda m, d: m(*sides(d)), settings=ONE)
    check_told(case, r"counting every position", kind="warning")
