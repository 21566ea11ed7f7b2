"""Rows that are not independent, or do not lie along the first axis: a batch may be cut only where a cut
batch gives the same outputs.
"""

import dataclasses

import pytest
import torch
from curvature_cases import (
    Case,
    Words,
    check_curvature,
    classifier,
    cross_entropy,
    mean_estimate,
    rows,
    sentences,
)
from torch import nn
from torch.nn import functional as F

DEFAULT = {"fraction": 1 / 8}
WHOLE = r"rows|whole"  # said once, where rows depend on each other


def mean(z, data):
    return F.cross_entropy(z, data[1])


def with_batch_norm():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class Recurrent(nn.Module):
    """Time first, as torch's recurrent layers have it by default: (T, B) to (T, B, 4)."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, batch_first=batch_first), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def sequences(time=12, n=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(time, n, 3, generator=g), torch.randint(0, 4, (time, n), generator=g)


class Attention(nn.Module):
    """One head of attention with a mask among the arguments."""

    def __init__(self):
        super().__init__()
        self.qk, self.head = nn.Linear(3, 6), nn.Linear(3, 4)

    def forward(self, x, mask):
        q, k = self.qk(x).chunk(2, -1)
        return self.head(F.scaled_dot_product_attention(2 * q, 2 * k, x, attn_mask=mask))


def square_mask(n=8):
    g = torch.Generator().manual_seed(2)
    return (
        torch.randn(n, n, 3, generator=g),
        torch.randint(0, 4, (n, n), generator=g),
        torch.ones(n, n).tril().bool(),
    )


class Contrast(nn.Module):
    """Every text against every image of the batch: logits (B, B)."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, images, texts):
        return self.image(images) @ self.text(texts).T


class Graph(nn.Module):
    """Every node sees its neighbours: rows of the second factor, and columns of the first, are all nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, adjacency):
        return self.second(adjacency @ torch.tanh(self.first(adjacency @ x)))


def graph(n=16):
    x, y = rows(n, classes=3)
    a = torch.eye(n) + torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    return x, y, a / a.sum(1, keepdim=True)


class Capacity(nn.Module):
    """Experts that take the best three eighths of the batch each: who is served depends on the others."""

    def __init__(self):
        super().__init__()
        self.router, self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        gates = torch.softmax(self.router(x), -1)
        capacity = max(1, len(x) * 3 // 8)
        served = gates >= gates.topk(capacity, 0).values[-1]
        gates = gates * served
        return gates[:, :1] * self.first(x) + gates[:, 1:] * self.second(x)


def second_and_third(m, data):
    return m(data[0], data[2])


CASES = {
    "rows-batchnorm": Case(with_batch_norm, lambda: rows(16, classes=3), mean, settings=DEFAULT, warns=WHOLE),
    "rows-batchnorm-64": Case(
        with_batch_norm, lambda: rows(64, classes=3), mean, settings=DEFAULT, warns=WHOLE
    ),
    "rows-batchnorm-fraction-1": Case(with_batch_norm, lambda: rows(16, classes=3), mean),
    # The rows are found in the second dimension.
    "rows-time-first": Case(
        Recurrent,
        sequences,
        lambda z, data: cross_entropy(z, data[1]),
        settings=DEFAULT,
        spread=2.2,
        draws=700,
    ),
    "rows-time-first-batch-dim": Case(
        Recurrent,
        sequences,
        lambda z, data: cross_entropy(z, data[1]),
        settings={**DEFAULT, "batch_dim": 1},
        spread=2.2,
        draws=700,
    ),
    "rows-batch-first": Case(
        lambda: Recurrent(batch_first=True),
        lambda: tuple(t.transpose(0, 1).contiguous() for t in sequences()),
        lambda z, data: cross_entropy(z, data[1]),
        settings=DEFAULT,
        spread=2.2,
        draws=700,
    ),
    "rows-square-mask": Case(
        Attention,
        square_mask,
        lambda z, data: cross_entropy(z, data[1]),
        outputs=second_and_third,
        settings=DEFAULT,
        warns=WHOLE,
    ),
    "rows-in-batch-contrast": Case(
        Contrast,
        lambda: (rows(16)[0], torch.arange(16), rows(16)[0].flip(1)),
        mean,
        outputs=second_and_third,
        settings=DEFAULT,
        warns=WHOLE,
    ),
    "rows-in-batch-contrast-fraction-1": Case(
        Contrast,
        lambda: (rows(16)[0], torch.arange(16), rows(16)[0].flip(1)),
        mean,
        outputs=second_and_third,
    ),
    "rows-graph": Case(
        Graph, graph, mean, outputs=second_and_third, settings=DEFAULT, warns=WHOLE, spread=1.5
    ),
    "rows-graph-fraction-1": Case(Graph, graph, mean, outputs=second_and_third),
    "rows-experts-with-a-capacity": Case(
        Capacity, lambda: rows(16, classes=3), mean, settings=DEFAULT, warns=WHOLE
    ),
    # nothing to say: a cut batch is the same function
    "rows-independent": Case(
        lambda: classifier(4, 6, 3),
        lambda: rows(32, classes=3),
        mean,
        settings=DEFAULT,
        spread=2.2,
        draws=700,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_cut_only_where_they_are_independent(case):
    """A model of a part of the batch that is another model: h 75 times too large, or 0, without a word."""
    check_curvature(case)


@pytest.mark.parametrize(
    ("name", "share"),
    [("rows-batchnorm", 1.0), ("rows-independent", 1 / 8), ("rows-batchnorm-fraction-1", 1.0)],
)
def test_share_of_the_batch_stands_in_the_statistics(name, share):
    """A refresh that costs eight times what was asked for, and no number says so."""
    case = dataclasses.replace(CASES[name], draws=2, warns=None)
    assert mean_estimate(case)[2]["share"] == share


def test_rows_one_packed_row():
    """All documents in one row: every refresh costs a whole step, instead of an eighth, and nothing says
    so.
    """
    case = Case(
        Words,
        lambda: sentences((48,), time=48),
        lambda z, data: cross_entropy(z, data[1]),
        settings=DEFAULT,
        warns=r"one row|single row|packed",
    )
    check_curvature(case)
