"""Models that were always right, held to the oracle of weighted losses so that they stay so, in silence."""

import re

import pytest
import torch
import torch.utils.checkpoint
from curvature_cases import (
    SIGMAS,
    SPREAD,
    Case,
    check_curvature,
    classifier,
    cross_entropy,
    differences,
    mean_estimate,
    rows,
    sentences,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from oracle import gauss_newton
from sophia import Sophia


def mean(z, data):
    return F.cross_entropy(z, data[1])


def of_tokens(z, data):
    return cross_entropy(z, data[1])


class Tied(nn.Module):
    """One table at both ends: h has the cross terms of its two uses."""

    def __init__(self):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return F.linear(torch.tanh(self.mix(self.tokens(ids).cumsum(1))), self.tokens.weight)


class Packed(nn.Module):
    """Rows of unlike lengths through packed sequences."""

    def __init__(self):
        super().__init__()
        self.tokens, self.lstm, self.head = (
            nn.Embedding(7, 3),
            nn.LSTM(3, 3, batch_first=True),
            nn.Linear(3, 7),
        )

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(self.tokens(ids), lengths, batch_first=True)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def normed(norm):
    def build():
        model = classifier()
        norm(model[2])
        return model

    return build


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = classifier()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


CASES = {
    "ordinary-tied": Case(Tied, sentences, of_tokens),
    "ordinary-packed-lstm": Case(
        Packed,
        lambda: (*sentences(), torch.tensor([6, 4, 2, 1])),
        of_tokens,
        outputs=lambda m, data: m(data[0], data[2]),
    ),
    "ordinary-weight-norm": Case(normed(weight_norm), rows, mean),
    "ordinary-checkpointing": Case(Checkpointed, rows, mean),
    "ordinary-layer-norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5)), rows, mean
    ),
    "ordinary-embedding-bag": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 5)),
        lambda: (sentences((6,) * 8)[0], torch.arange(8) % 5),
        mean,
    ),
    "ordinary-images": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
        lambda: (torch.randn(16, 1, 4, 4), torch.arange(16) % 4),
        mean,
        settings={"fraction": 1 / 8},
        spread=2.2,
        draws=700,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_h_of_an_ordinary_model(case):
    """A proof that refuses what was right, or bends its h."""
    check_curvature(case)


class Dropping(nn.Module):
    """Dropout, and a layer that is left out in half of the forwards."""

    def __init__(self, dropout, layer_drop):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.dropout, self.layer_drop = nn.Dropout(dropout), layer_drop

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if float(torch.rand(())) >= self.layer_drop:
            x = x + torch.tanh(self.middle(x))
        return self.last(self.dropout(x))


@pytest.mark.parametrize(
    ("dropout", "layer_drop"), [(0.3, 0.0), (0.0, 0.5)], ids=["ordinary-dropout", "ordinary-layer-drop"]
)
@pytest.mark.parametrize("fraction", [1.0, 1 / 8])
def test_h_under_randomness_is_the_mean_over_its_noise(dropout, layer_drop, fraction):
    """A proof by comparison that takes noise for another function; rows are proved with all of it off."""
    case = Case(
        lambda: Dropping(dropout, layer_drop),
        lambda: rows(16),
        mean,
        spread=SPREAD if fraction == 1 else 2.4,
        draws=500 if fraction == 1 else 800,
        settings={"fraction": fraction},
    )
    torch.manual_seed(0)
    model, data = case.model(), case.data()
    masks = 100
    exact = [gauss_newton(model, data, case.outputs, case.loss) for _ in range(masks)]
    exact = {name: sum(e[name] for e in exact) / masks for name in exact[0]}
    found, words, stats = mean_estimate(case)
    # a layer that the training's forward has and the refresh's has not may be spoken of as what it is
    assert not [w for w in words if not re.search(r"left out|random|chance", w)], words
    assert stats["skipped"] == 0
    # The oracle's own noise: a layer that is left out in half of a hundred forwards
    allowed = SIGMAS * (case.spread / case.draws**0.5 + 0.1 * SPREAD / masks**0.5) + 0.1
    wrong = {name: d for name, d in differences(found, exact).items() if not d < allowed}
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_h_of_half_precision_weights(dtype):
    """Weights, gradients and the pass in half precision; h in float32."""
    case = Case(
        lambda: classifier().to(dtype),
        lambda: (rows()[0].to(dtype), rows()[1]),
        lambda z, data: F.cross_entropy(z.float() if z.dtype == dtype else z, data[1]),
        slack=0.05,
    )
    check_curvature(case)


def test_ordinary_frozen_trunk():
    """Parameters that need no gradient are no reason for words."""

    def build():
        model = classifier()
        model[0].requires_grad_(False)
        return model

    case = Case(build, rows, mean)
    check_curvature(case)


def test_ordinary_spectral_norm_moves_its_vectors_once():
    """Vectors of the power iteration, which are buffers, moved by a refresh."""
    vectors = []
    for every in (1, 1000):
        torch.manual_seed(0)
        model = classifier()
        spectral_norm(model[0])
        opt = Sophia(model, lr=0.0, weight_decay=0.0, update_every=every)
        x, y = rows()
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        vectors.append([b.clone() for b in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*vectors, strict=True))
