"""Outputs: all that the loss uses count, and those that are no logits are told from logits."""

import pytest
import torch
from curvature_cases import (
    Case,
    Words,
    check_curvature,
    check_curvature_or_told,
    check_told,
    classifier,
    cross_entropy,
    mean_estimate,
    rows,
    sentences,
)
from torch import nn
from torch.nn import functional as F

from said import said
from sophia import Sophia
from sophia.likelihoods import Categorical, Heads


class Trunk(nn.Module):
    """Hidden states, two heads, and a way to return them."""

    def __init__(self, form, second=5):
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, second)
        self.form = form

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.form(self.first(hidden), self.second(hidden))


def two_heads(form, second=5):
    return lambda: Trunk(form, second)


def as_dict(a, b):
    return {"logits": a, "aux": b}


def with_value(a, b):
    return {"logits": a, "value": b}


def pair(a, b):
    return a, b


def both(z, data):
    a, b = z.values() if isinstance(z, dict) else z
    return F.cross_entropy(a, data[1]) + 0.4 * F.cross_entropy(b, data[1])


def with_regression(z, data):
    return F.cross_entropy(z["logits"], data[1]) + 0.4 * F.mse_loss(z["value"], data[0][:, :1])


class Chunks(Words):
    """Logits in chunks of two positions, so that they never exist at once."""

    def forward(self, ids):
        return list(super().forward(ids).split(2, 1))


def of_chunks(z, data):
    return cross_entropy(torch.cat(z, 1), data[1])


def of_each_chunk(z, data):
    ends = zip(z, data[1].split(2, 1), strict=True)
    return sum(cross_entropy(a, b, reduction="sum") for a, b in ends) / (data[1] >= 0).sum()


def prompts_first():
    """The first two positions of every row are the prompt."""
    ids, y = sentences((6, 6, 5, 4))
    return ids, y.masked_fill(torch.arange(6)[None] < 2, -100)


class Views(nn.Module):
    """Both views of an in-batch contrast, as two outputs that are one tensor and its transpose."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        per_image = self.image(x) @ self.text(x.flip(1)).T
        return {"logits_per_image": per_image, "logits_per_text": per_image.T}


def of_views(z, data):
    y = torch.arange(len(data[0]))
    return (F.cross_entropy(z["logits_per_image"], y) + F.cross_entropy(z["logits_per_text"], y)) / 2


def of_one_view(z, data):
    y = torch.arange(len(data[0]))
    return (F.cross_entropy(z["logits_per_text"], y) + F.cross_entropy(z["logits_per_text"].T, y)) / 2


VIEWS = {"likelihood": Heads({"logits_per_image": Categorical(), "logits_per_text": Categorical()})}


def log_probabilities():
    return nn.Sequential(classifier(), nn.LogSoftmax(-1))


def with_nll_loss(model, opt, data, case):
    F.nll_loss(model(data[0]), data[1]).backward()
    opt.step()


CASES = {
    "outputs-chunks": Case(Chunks, sentences, of_chunks),
    "outputs-chunks-one-loss-each": Case(Chunks, sentences, of_each_chunk),
    "outputs-chunks-after-a-prompt": Case(Chunks, prompts_first, of_chunks),
    "outputs-two-heads-dict": Case(two_heads(as_dict), rows, both),
    "outputs-two-heads-tuple": Case(two_heads(pair), rows, both),
    "outputs-one-head-of-two": Case(
        two_heads(as_dict), rows, lambda z, data: F.cross_entropy(z["logits"], data[1])
    ),
    "outputs-two-views": Case(Views, lambda: rows(8), of_views, settings=VIEWS),
    # nll_loss itself is a straight line in its input: what has a curvature is the softmax before it
    "outputs-log-probabilities": Case(
        log_probabilities, rows, lambda z, data: F.cross_entropy(z, data[1]), loop=with_nll_loss
    ),
    "outputs-log-probabilities-cross-entropy": Case(
        log_probabilities, rows, lambda z, data: F.cross_entropy(z, data[1])
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_outputs_of_the_loss_count(case):
    """Only the first output, or the first chunk, replayed: the rest of the loss has no curvature."""
    check_curvature(case)


def test_outputs_chunks_joined_by_hand():
    """Logits that no gradient reaches, as the loss uses their parts."""
    case = Case(Chunks, sentences, of_chunks, settings={"logits_fn": lambda z: torch.cat(z, 1)})
    check_curvature_or_told(case, r"counting every position|mask_fn")


class ReturnsLoss(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.net, self.reduction = classifier(), reduction

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y, reduction=self.reduction)


class Named(nn.Module):
    """An output whose tensors have names, none of them logits."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return {"image_embeds": self.image(x), "text_embeds": self.text(x)}


def xy(m, data):
    return m(*data)


TOLD = {
    "outputs-value-head-without-heads": (
        Case(two_heads(with_value, 1), rows, with_regression),
        r"Heads",
        "either",
    ),
    "outputs-one-view-and-its-transpose": (
        Case(Views, lambda: rows(8), of_one_view, settings=VIEWS),
        r"transpose|logits_per_text",
        "either",
    ),
    "outputs-one-column-of-answers": (
        Case(
            lambda: classifier(4, 6, 1),
            rows,
            lambda z, data: F.binary_cross_entropy_with_logits(z[:, 0], (data[1] > 1).to(z.dtype)),
        ),
        r"one (column|class).*bernoulli|bernoulli.*one (column|class)",
        "error",
    ),
    "outputs-one-column-of-numbers": (
        Case(lambda: classifier(4, 6, 1), rows, lambda z, data: F.mse_loss(z, data[0][:, :1])),
        r"one (column|class).*gaussian|gaussian.*one (column|class)",
        "error",
    ),
    "outputs-named-fields": (
        Case(Named, rows, lambda z, data: (z["image_embeds"] * z["text_embeds"]).sum()),
        r"image_embeds",
        "error",
    ),
}


@pytest.mark.parametrize(("case", "words", "kind"), TOLD.values(), ids=TOLD)
def test_outputs_that_are_no_logits_are_told(case, words, kind):
    """Curvature of a softmax over something that is no logits."""
    check_told(case, words, kind=kind)


def test_outputs_returned_loss_with_hutchinson():
    """An estimator that needs nothing but the loss refused a model that gives it."""
    case = Case(
        ReturnsLoss,
        rows,
        lambda z, data: z,
        outputs=xy,
        settings={"estimator": "hutchinson"},
        draws=5,
    )
    found, words, stats = mean_estimate(case)
    assert (words, stats["refreshes"]) == ([], 5)
    assert any(bool(h.any()) for h in found.values())


@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_wide_logits_are_logits(width, dtype):
    """A true cross-entropy in half precision, told that it is none."""
    model = nn.Linear(8, width)
    nn.init.normal_(model.weight)
    opt = Sophia(model, lr=0.0, update_every=1)
    x, y = torch.randn(64, 8), torch.randint(0, width, (64,))

    def run():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()

    assert not said(run)
    assert opt.stats()["refreshes"] == 1
