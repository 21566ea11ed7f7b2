"""Losses that people train with: teachers, alignments, straight pieces. Right against an oracle, or refused
with a sentence that is then followed.
"""

import itertools

import pytest
import torch
from curvature_cases import (
    Case,
    Words,
    check_curvature,
    check_told,
    classifier,
    judged,
    mean_estimate,
    rows,
    sentences,
)
from field_cases import check_hutchinson_by_hand
from torch import nn
from torch.nn import functional as F

from sophia.likelihoods import CTC, Distillation

T = 3.0


# ---- a teacher at a temperature


def kl(z, data, temperature=T):
    """Mean over the predictions that count, times T^2."""
    teacher = data[0].flatten()[: z.shape[-1]].to(z) * torch.arange(1.0, z.shape[-1] + 1).to(z)
    log_p, q = torch.log_softmax(z / temperature, -1), torch.softmax(teacher / temperature, -1)
    each = temperature**2 * (q * (q.log() - log_p)).sum(-1)
    counted = data[1] >= 0
    return (each * counted).sum() / counted.sum()


def both(z, data):
    return 0.3 * F.cross_entropy(z.flatten(0, -2), data[1].flatten(), ignore_index=-100) + 0.7 * kl(z, data)


def taught(loss, likelihood, model=classifier, data=rows, **settings):
    return Case(model, data, loss, settings={"likelihood": likelihood, **settings})


DISTILLED = {
    "alone": taught(kl, Distillation(T)),
    "beside-the-labels": taught(both, Distillation(T, hard=0.3, soft=0.7)),
    "padded-text": taught(both, Distillation(T, hard=0.3, soft=0.7), Words, sentences),
    "without-the-square": taught(lambda z, d: kl(z, d) / T**2, Distillation(T, soft=1 / T**2)),
    "colder": taught(lambda z, d: kl(z, d, 0.7), Distillation(0.7)),
}


@pytest.mark.parametrize("case", DISTILLED.values(), ids=DISTILLED)
def test_distillation(case):
    """T^2 lost or counted twice, the labels' part forgotten, padding counted."""
    check_curvature(case)


def test_distillation_in_a_part_of_the_rows():
    """A weight of the whole batch on the rows that were cut."""
    case = taught(both, Distillation(T, hard=0.3, soft=0.7), fraction=0.5)
    check_curvature(Case(case.model, case.data, case.loss, settings=case.settings, draws=600, spread=2.0))


def reverse(z, data):
    """The divergence of the student from the teacher, as on-policy distillation has it."""
    log_q = torch.log_softmax(data[0][:, :1] * torch.arange(5.0).to(z), -1)
    log_p = torch.log_softmax(z, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


DISTILLED_TOLD = {
    "by-default": (Case(classifier, rows, kl), r"Distillation\(T, hard"),
    "reverse": (Case(classifier, rows, reverse), r"hutchinson"),
    "another-factor": (taught(lambda z, d: 5 * kl(z, d), Distillation(T)), r"at least .* of what a mean"),
    "not-the-logits": (
        taught(lambda z, d: F.mse_loss(z, d[0][:, :1].expand(-1, 5).to(z)), Distillation(T)),
        r"over the classes it sums to .*gaussian",
    ),
}


@pytest.mark.parametrize(("case", "words"), DISTILLED_TOLD.values(), ids=DISTILLED_TOLD)
def test_distillation_told(case, words):
    """A temperature, a factor or another divergence taken for a mean, in silence."""
    check_told(case, words)


def test_reverse_divergence_by_hutchinson():
    """The way out of the sentence above."""
    check_hutchinson_by_hand(classifier, rows(), lambda m, data: reverse(m(data[0]), data), count=13)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 2.0, "hard": -1.0}, {"temperature": 2.0, "soft": 0.0}]
)
def test_distillation_refuses_numbers_without_sense(settings):
    """A root of a negative factor, found in a refresh."""
    with pytest.raises(ValueError, match=r"above 0.*categorical"):
        Distillation(**settings)


# ---- label sequences without their place in time


class Listener(nn.Module):
    """Logits ``(N, T, C)``, or time first, of sums of the frames so far."""

    def __init__(self, time_first=False, classes=3):
        super().__init__()
        self.net, self.time_first = classifier(4, 5, classes), time_first

    def forward(self, x):
        z = 1.5 * self.net(x.cumsum(1) / 2)
        return z.transpose(0, 1) if self.time_first else z


def utterances():
    """Inputs, labels, lengths of inputs and labels; the blank is 0."""
    g = torch.Generator().manual_seed(3)
    labels = torch.tensor([[1, 2], [2, 0], [1, 0], [2, 1]])
    return torch.randn(4, 4, 4, generator=g), labels, torch.tensor([4, 3, 4, 4]), torch.tensor([2, 1, 1, 2])


def ctc(z, data, **settings):
    """Of logits (N, T, C)."""
    return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), *data[1:], **settings)


def fisher(z, weights, lengths):
    """Exact curvature in the outputs ``(N, T, C)``: by all label sequences, weighted by their probability."""
    n, time, classes = z.shape
    blocks = torch.zeros(n, time * classes, time * classes, dtype=z.dtype)
    for row, length in enumerate(lengths.tolist()):
        paths = itertools.product(range(classes), repeat=length)
        texts = {tuple(k for k, _ in itertools.groupby(path) if k) for path in paths}
        total = 0.0
        for text in texts:
            leaf = z[row : row + 1].detach().clone().requires_grad_()
            label = torch.tensor([text], dtype=torch.long)
            loss = ctc(
                leaf, (None, label, torch.tensor([length]), torch.tensor([len(text)])), reduction="sum"
            )
            (slope,) = torch.autograd.grad(loss, leaf)
            probability, slope = float((-loss.detach()).exp()), slope.flatten()
            total += probability
            blocks[row] += weights[row] * probability * torch.outer(slope, slope)
        assert total == pytest.approx(1.0, abs=1e-6)  # no text is missing
    return blocks


def exact_of_ctc(model, data, weights):
    model = model.double()
    z = model(data[0].double())
    blocks = fisher(z, weights, data[2])
    found = {}
    for name, p in model.named_parameters():
        rows_ = [torch.autograd.grad(v, p, retain_graph=True)[0].flatten() for v in z.flatten().unbind()]
        j = torch.stack(rows_).view(len(z), -1, p.numel())
        found[name] = torch.einsum("nip,nij,njp->p", j, blocks, j).view_as(p)
    return found


def test_ctc_draws_label_sequences():
    """Another covariance than the Fisher matrix of the label sequences: 20,000 draws, of 1% each."""
    torch.manual_seed(0)
    z = torch.randn(1, 4, 3, dtype=torch.float64)
    many = z.expand(20000, -1, -1).contiguous()
    generator, every = torch.Generator().manual_seed(1), torch.ones(20000, 4, dtype=torch.bool)
    e = CTC().sampled_gradient(many, every, generator).flatten(1)
    exact = fisher(z, [1.0], torch.tensor([4]))[0]
    assert float((e.T @ e / len(e) - exact).norm() / exact.norm()) < 0.05
    assert float(e.mean(0).norm() / exact.diagonal().sum().sqrt()) < 0.05


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("time_first", [False, True])
def test_ctc(reduction, time_first):
    """A softmax for each frame in the place of the loss, frames beyond the end, utterances of one weight."""
    settings = {"likelihood": CTC()}
    if time_first:
        settings["logits_fn"] = lambda z: z.transpose(0, 1)

    def loss(z, data):
        return ctc(z.transpose(0, 1) if time_first else z, data, reduction=reduction)

    case = Case(lambda: Listener(time_first), utterances, loss, settings=settings)
    data = utterances()
    weights = torch.ones(4) if reduction == "sum" else 1 / (4 * data[3].double())
    torch.manual_seed(0)
    exact = exact_of_ctc(Listener(), data, weights)
    stats = judged(case, exact, *mean_estimate(case))
    assert stats["B"] == int(data[2].sum())


def speech():
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(5, 12, 4, generator=g),
        torch.randint(1, 9, (5, 4), generator=g),
        torch.full((5,), 12),
        torch.full((5,), 4),
    )


CTC_TOLD = {
    "by-default": (Case(lambda: Listener(classes=9), speech, ctc), r"CTC loss.*likelihood=CTC"),
    "by-default-time-first": (
        Case(lambda: Listener(True, 9), speech, lambda z, d: ctc(z.transpose(0, 1), d)),
        r"CTC loss.*likelihood=CTC",
    ),
    "time-first": (
        Case(
            lambda: Listener(True, 9),
            speech,
            lambda z, d: ctc(z.transpose(0, 1), d),
            settings={"likelihood": CTC()},
        ),
        r"transpose\(0, 1\)",
    ),
}


@pytest.mark.parametrize(("case", "words"), CTC_TOLD.values(), ids=CTC_TOLD)
def test_ctc_told(case, words):
    """A curvature that is told where the labels lie, in silence."""
    check_told(case, words)


def test_torch_has_no_second_derivative_of_ctc():
    """The day it has, Hutchinson is another way, and the sentence above says otherwise."""
    z = torch.randn(6, 1, 5, requires_grad=True)
    loss = F.ctc_loss(z.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2]))
    (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="_ctc_loss_backward is not implemented"):
        torch.autograd.grad(slope.square().sum(), z)
