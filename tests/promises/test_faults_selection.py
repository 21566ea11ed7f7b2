"""A refresh takes a part of the batch: whichever rows and micro-batches come first must not decide h, and no
estimate is dropped for its value.
"""

import pytest
import torch
from curvature_cases import (
    DRAWS,
    Case,
    Words,
    check_curvature,
    check_told,
    classifier,
    cross_entropy,
    mean_estimate,
    rows,
    sentences,
)
from torch import nn
from torch.nn import functional as F

DEFAULT = {"fraction": 1 / 8}


def one_backward_each(model, opt, data, case):
    """Micro-batches, divided by their number."""
    x, y = data
    for part, label in zip(x, y, strict=True):
        (F.cross_entropy(model(part), label) / len(x)).backward()
    opt.step()


def of_kinds(n=32):
    """Two kinds of rows, in order: h of the first layer's second column comes from the second half alone."""
    x = torch.zeros(n, 2)
    x[: n // 2, 0], x[n // 2 :, 1] = 1.0, 1.0
    return x, torch.arange(n) % 2


def constant_then_random():
    x, y = rows(8, classes=3)
    x[:4] = 0.3
    return x, y


def micro_batches_of_kinds():
    x, y = of_kinds(32)
    return x.view(8, 4, 2), y.view(8, 4)


def empty_first():
    return sentences((0, *[3, 6, 5, 4, 6, 2, 6, 4, 3, 5, 6, 6, 4, 6, 5]))


def empty_first_micro_batch():
    ids, y = sentences((0, 0, 3, 6, 5, 4, 6, 2))
    return ids.view(4, 2, 6), y.view(4, 2, 6)


def tokens_of_micro_batches(model, opt, data, case):
    ids, y = data
    for part, label in zip(ids, y, strict=True):
        (cross_entropy(model(part), label, reduction="sum") / (y >= 0).sum()).backward()
    opt.step()


def of_tokens(outputs, data):
    return cross_entropy(torch.cat(outputs), data[1].flatten(0, 1), reduction="sum") / (data[1] >= 0).sum()


def each(model, data):
    return [model(part) for part in data[0]]


def two_to_two():
    return classifier(2, 8, 2)


CASES = {
    # a draw takes one of two micro-batches: h of a coordinate that only one reaches is 2 x chi-square or 0
    "selection-gan": Case(
        lambda: classifier(2, 5, 1),
        lambda: (torch.randn(8, 2) + 2.0, torch.randn(8, 2) - 1.0),
        lambda z, _: (
            F.binary_cross_entropy_with_logits(z[0], torch.ones_like(z[0]))
            + F.binary_cross_entropy_with_logits(z[1], torch.zeros_like(z[1]))
        ),
        outputs=lambda m, data: [m(data[0]), m(data[1])],
        settings={**DEFAULT, "likelihood": "bernoulli"},
        spread=2.3,
        draws=2 * DRAWS,
    ),
    "selection-ordered-rows": Case(
        two_to_two, of_kinds, lambda z, data: F.cross_entropy(z, data[1]), settings=DEFAULT, spread=1.7
    ),
    "selection-ordered-micro-batches": Case(
        two_to_two,
        micro_batches_of_kinds,
        lambda z, data: sum(F.cross_entropy(a, b) for a, b in zip(z, data[1], strict=True)) / len(z),
        outputs=each,
        loop=one_backward_each,
        settings=DEFAULT,
        spread=2.3,
        draws=2 * DRAWS,
    ),
    "selection-constant-rows-first": Case(
        lambda: classifier(4, 5, 3),
        constant_then_random,
        lambda z, data: F.cross_entropy(z, data[1]),
        settings={"fraction": 1 / 4},
        spread=2.8,
        draws=3 * DRAWS,
    ),
    "selection-empty-first-row": Case(
        Words,
        empty_first,
        lambda z, data: cross_entropy(z, data[1]),
        settings=DEFAULT,
        spread=2.0,
        draws=2 * DRAWS,
    ),
    "selection-empty-first-micro-batch": Case(
        Words,
        empty_first_micro_batch,
        of_tokens,
        outputs=each,
        loop=tokens_of_micro_batches,
        settings=DEFAULT,
        spread=2.5,
        draws=3 * DRAWS,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_order_of_a_batch_does_not_decide_h(case):
    """The first rows or micro-batches taken for a sample: h of what comes later is too small, or 0."""
    assert check_curvature(case)["skipped"] == 0


def test_selection_random_empty_rows():
    """One row without a label, anywhere in the batch: refreshes lost, as often as it comes first."""
    turn = torch.Generator().manual_seed(3)

    def loop(model, opt, data, case):
        ids, y = data
        empty = int(torch.randint(0, 8, (1,), generator=turn))
        y = y.index_fill(0, torch.tensor([empty]), -100)
        cross_entropy(model(ids), y).backward()
        opt.step()

    case = Case(Words, lambda: sentences((6,) * 8), None, loop=loop, settings=DEFAULT, draws=60)
    _, words, stats = mean_estimate(case)
    assert (words, stats["skipped"], stats["refreshes"]) == ([], 0, 60)


# ---- a zero that is right ----


def of_bias(*bias):
    """One input, always 1: the probabilities are the softmax of the biases."""

    def build():
        model = nn.Linear(1, len(bias))
        nn.init.zeros_(model.weight)
        model.bias.data.copy_(torch.tensor(bias))
        return model

    return build


def ones(n=8):
    return torch.ones(n, 1), torch.zeros(n, dtype=torch.long)


def mean(z, data):
    return F.cross_entropy(z, data[1])


ZEROS = {
    # Four pairs of one row, each with a = b at probability 0.83: half of all passes are zero by right. The
    # fourth moment of a rare class is 6.5 times the squared second, that of p = 0.99 15 times.
    "zero-four-classes": Case(
        of_bias(3.41, 0.0, 0.0, 0.0), ones, mean, settings=DEFAULT, spread=2.4, draws=1500
    ),
    "zero-two-classes": Case(of_bias(4.6, 0.0), ones, mean, settings=DEFAULT, spread=3.8, draws=2500),
    "zero-two-classes-whole-batch": Case(of_bias(4.6, 0.0), ones, mean, spread=1.9, draws=1000),
    "zero-bernoulli": Case(
        of_bias(4.6),
        ones,
        lambda z, data: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
        settings={"likelihood": "bernoulli"},
        spread=4.0,
        draws=2500,
    ),
}


@pytest.mark.parametrize("case", ZEROS.values(), ids=ZEROS)
def test_an_estimate_that_is_zero_by_right_is_averaged(case):
    """H of confident classifiers, small batches and few labels tends to the truth over P(not zero)."""
    assert check_curvature(case)["skipped"] == 0


def test_zero_where_nothing_arrives_is_still_told():
    """Logits that do not depend on the parameters, taken for a confident model."""

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 5)
            # Neither a buffer nor a plain attribute: how far it has come is not put back for a refresh,
            # whose forward is another one than the training's, of the same values.
            self.turns = iter([True])

        def forward(self, x):
            return self.used(x) if next(self.turns, False) else self.used(x).detach().requires_grad_()

    case = Case(
        Detached,
        rows,
        lambda z, data: F.cross_entropy(z, data[1]),
        settings={"fraction": 1.0},
    )
    check_told(case, r"detached|do not depend|cannot be repeated", steps=1)
