"""Losses that are no weighted cross-entropy in the outputs: told from one at the first due step, with the
cause; and those that look odd but are one, without a false alarm.
"""

import copy

import pytest
import torch
from curvature_cases import (
    Case,
    Words,
    check_curvature,
    check_told,
    classifier,
    per_token,
    rows,
    sentences,
)
from torch import nn
from torch.nn import functional as F

from said import said
from sophia import Sophia


def classes(loss, **settings):
    return Case(classifier, rows, loss, **settings)


def focal(z, data):
    losses = F.cross_entropy(z, data[1], reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


def policy(z, data):
    """Policy gradient: minus the log-probability of the action times an advantage of either sign."""
    advantages = torch.linspace(-1.0, 1.5, len(data[1]), dtype=z.dtype)
    return (advantages * F.cross_entropy(z, data[1], reduction="none")).mean()


def pairs():
    ids, y = sentences((6, 5, 4, 6, 6, 3, 5, 6))
    return ids, y


def preference(z, data, beta=0.5):
    """DPO: chosen rows first, rejected rows then; the reference model is uniform."""
    counted = data[1] >= 0
    log_p = -(per_token(z, data[1]) * counted).sum(1)
    chosen, rejected = log_p.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def distilled(z, data):
    """Distillation at temperature 3, times 9 as usual."""
    teacher = torch.softmax(data[0][:, :1] * torch.arange(5.0, dtype=z.dtype) / 3, -1)
    return 9 * F.kl_div(torch.log_softmax(z / 3, -1), teacher, reduction="batchmean")


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = classifier(4, 6, 5)

    def forward(self, x):
        return self.net(x)


def two_views(m, data):
    return [m(data[0]), m(data[0] + 0.1 * data[0].flip(1))]


def contrast(z, data):
    """Contrast over two forwards: a row of the first is to find its own row of the second."""
    a, b = (F.normalize(part, dim=-1) for part in z)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def two_classes(loss, n=40):
    return Case(lambda: classifier(4, 6, 2), lambda: rows(n, classes=2), loss)


def mixed(z, data, share):
    """Mixup: of the labels of two examples, with a share of each."""
    losses = [F.cross_entropy(z, y, reduction="none") for y in (data[1], data[1].roll(7))]
    return (share * losses[0] + (1 - share) * losses[1]).mean()


def images():
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, 4, (4, 4, 6), generator=g)
    y[:, 0] = 255
    return torch.randn(4, 1, 4, 6, generator=g), y


def segmenter():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1))


def segmented(z, data):
    """Classes in dimension 1, some void pixels, weights of classes."""
    weight = torch.tensor([0.3, 1.0, 2.0, 0.6], dtype=z.dtype)
    return F.cross_entropy(z, data[1], weight=weight, ignore_index=255)


def fed_back(m, data):
    x = data[0]
    for _ in range(3):
        x = m(x)
    return x


TOLD = {
    "losses-focal": (classes(focal), r"cross-entropy.*\d ?%|\d ?%.*cross-entropy", "warning"),
    "losses-temperature-outside": (
        classes(lambda z, data: F.cross_entropy(z / 2, data[1])),
        r"temperature|divided",
        "either",
    ),
    "losses-distillation-with-a-temperature": (classes(distilled), r"temperature|divided", "either"),
    "losses-preference": (
        Case(Words, pairs, preference),
        r"sign|negative|pair|preference",
        "either",
    ),
    "losses-signed-advantages": (classes(policy), r"sign|negative|advantage", "either"),
    "losses-minus-cross-entropy": (
        classes(lambda z, data: -F.cross_entropy(z, data[1])),
        r"sign|negative|minus",
        "error",
    ),
    "losses-entropy-bonus": (
        classes(
            lambda z, data: (
                F.cross_entropy(z, data[1])
                + 0.5 * (torch.softmax(z, -1) * torch.log_softmax(z, -1)).sum(-1).mean()
            )
        ),
        r"cross-entropy",
        "either",
    ),
    "losses-squared-error": (
        classes(lambda z, data: F.mse_loss(z, data[0][:, :1].expand(-1, 5))),
        r"gaussian|likelihood=",
        "either",
    ),
    "losses-squared-error-of-two-columns": (
        two_classes(lambda z, data: F.mse_loss(z, data[0][:, :2])),
        r"gaussian",
        "error",
    ),
    "losses-head-outside-of-two-columns": (
        two_classes(
            lambda z, data: F.cross_entropy(z @ torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.4, -1.0]]), data[1])
        ),
        r"hidden states",
        "error",
    ),
    "losses-soft-targets-of-two-classes": (
        two_classes(lambda z, data: F.cross_entropy(z, torch.softmax(data[0][:, :2], -1))),
        r"two classes.*soft",
        "warning",
    ),
    "losses-classes-in-dimension-1": (
        Case(segmenter, images, segmented),
        r"dimension 1.*movedim\(1, -1\)",
        "error",
    ),
    "losses-bce-as-categorical": (
        classes(lambda z, data: F.binary_cross_entropy_with_logits(z, F.one_hot(data[1], 5).to(z.dtype))),
        r"bernoulli|likelihood=",
        "either",
    ),
    "losses-hinge": (
        classes(lambda z, data: F.multi_margin_loss(z, data[1])),
        r"cross-entropy",
        "either",
    ),
    "losses-contrast-over-two-forwards": (
        Case(Embed, rows, contrast, outputs=two_views),
        r"manual|hessian_pass",
        "either",
    ),
    "losses-output-fed-back": (
        Case(
            lambda: classifier(4, 6, 4),
            lambda: rows(8, classes=4),
            lambda z, data: F.cross_entropy(z, data[1]),
            outputs=fed_back,
        ),
        r"fed back|into the model|another forward|manual|hessian_pass",
        "either",
    ),
}


@pytest.mark.parametrize(("case", "words", "kind"), TOLD.values(), ids=TOLD)
def test_losses_that_are_no_cross_entropy_are_told(case, words, kind):
    """A gradient that sums to zero over the classes, taken for that of a cross-entropy."""
    check_told(case, words, kind=kind)


def test_losses_a_later_forward_is_checked_too():
    """Only the first gradient that arrives compared with the likelihood."""

    def loop(model, opt, data, case):
        F.cross_entropy(model(data[0]), data[1]).backward()
        policy(model(data[0]), data).backward()
        opt.step()

    check_told(classes(None, loop=loop), r"sign|negative|advantage")


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_losses_teacher_equal_to_the_student(half):
    """Rounding noise is all that the gradient holds at the first step: no alarm, no error, no h of noise."""
    torch.manual_seed(0)
    student = classifier()
    teacher = copy.deepcopy(student)
    opt = Sophia(student, lr=1e-3, update_every=1, fraction=1.0)
    x, _ = rows()

    def run():
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                with torch.no_grad():
                    q = torch.softmax(teacher(x).float(), -1)
                loss = F.cross_entropy(student(x).float(), q)
            loss.backward()
            opt.step()
            opt.zero_grad()

    heard = said(run)
    assert not [w for w in heard if "cross-entropy" in w or "likelihood" in w], heard
    assert all(bool(p.isfinite().all()) for p in student.parameters())


NO_ALARM = {
    "losses-hard-and-soft-targets": classes(
        lambda z, data: (
            0.5 * F.cross_entropy(z, data[1])
            + 0.5 * F.cross_entropy(z, torch.softmax(data[0][:, :1] * torch.arange(5.0, dtype=z.dtype), -1))
        )
    ),
    "losses-mixup": classes(
        lambda z, data: 0.7 * F.cross_entropy(z, data[1]) + 0.3 * F.cross_entropy(z, data[1].flip(0))
    ),
    "losses-kl-divergence": classes(
        lambda z, data: F.kl_div(
            torch.log_softmax(z, -1),
            torch.softmax(data[0][:, :1] * torch.arange(5.0, dtype=z.dtype), -1),
            reduction="batchmean",
        )
    ),
    "losses-positive-advantages": classes(
        lambda z, data: (
            torch.linspace(0.0, 2.0, 13, dtype=z.dtype) * F.cross_entropy(z, data[1], reduction="none")
        ).mean()
    ),
    "losses-mixup-of-two-classes": two_classes(lambda z, data: mixed(z, data, 0.7)),
    "losses-weighted-rows-of-two-classes": two_classes(
        lambda z, data: (
            torch.linspace(0.1, 2.0, 40, dtype=z.dtype) * F.cross_entropy(z, data[1], reduction="none")
        ).mean()
    ),
    "losses-of-a-view-by-logits-fn": Case(
        segmenter, images, segmented, settings={"logits_fn": lambda z: z.movedim(1, -1)}
    ),
    "losses-two-classes": Case(
        lambda: classifier(4, 6, 2), lambda: rows(classes=2), lambda z, data: F.cross_entropy(z, data[1])
    ),
}


@pytest.mark.parametrize("case", NO_ALARM.values(), ids=NO_ALARM)
def test_losses_that_are_a_cross_entropy_after_all(case):
    """A false alarm, or the weight of a soft target misread."""
    check_curvature(case)
