"""Weights read from gradients of known losses: fast, and so over many classes and dtypes."""

import pytest
import torch
from torch.nn import functional as F

from sophia.likelihoods import Bernoulli
from sophia.likelihoods.evidence import BALANCE
from sophia.likelihoods.weights import probes_of, read_weights


def reading(loss, classes, *, rows=64, spread=1.0, dtype=torch.float32, scale=1.0):
    """What is read of ``scale * loss(z, y)``, and labels."""
    g = torch.Generator().manual_seed(classes)
    z = (spread * torch.randn(rows, classes, generator=g)).to(dtype).requires_grad_()
    y = torch.randint(0, classes, (rows,), generator=g)
    (scale * loss(z.float(), y)).backward()
    counted = (z.grad != 0).any(-1)
    return read_weights(z.grad, probes_of(z), counted), y, counted


def by_class(classes):
    return torch.linspace(0.5, 2.0, classes)


def weights_of(y, classes, smoothing, weighted):
    """What each prediction weighs: by class, smoothing mixes in the weights of all classes."""
    w = by_class(classes) if weighted else torch.ones(classes)
    return ((1 - smoothing) * w[y] + smoothing * w.mean()) / w[y].sum()


def smoothed(classes, smoothing, weighted):
    w = by_class(classes) if weighted else None
    return lambda z, y: F.cross_entropy(z, y, weight=w, label_smoothing=smoothing)


@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 100])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "by-class"])
def test_smoothed_labels_of_few_and_many_classes(classes, spread, weighted):
    """A smoothed label taken for a smaller weight, where the softmax is peaked and the classes are few."""
    found, y, counted = reading(smoothed(classes, 0.1, weighted), classes, spread=spread, rows=128)
    assert found.problem is None
    right = weights_of(y, classes, 0.1, weighted)
    torch.testing.assert_close(
        found.weights[counted], right[counted], rtol=0.03, atol=0.03 * float(right.max())
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "by-class"])
@pytest.mark.parametrize("sizes", [(16, 16), (2, 20, 10), (9, 9, 9, 9)])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_kinds_of_equal_rows_each_with_its_label(classes, sizes, weighted):
    """Two points always have a line: a slope 18 times the weight, or one made of rounding."""
    g = torch.Generator().manual_seed(0)
    z = torch.cat([torch.randn(1, classes, generator=g).expand(n, -1) for n in sizes]).requires_grad_()
    y = torch.cat([torch.full((n,), kind % 2) for kind, n in enumerate(sizes)])
    smoothed(classes, 0.0, weighted)(z, y).backward()
    found = read_weights(z.grad, probes_of(z), torch.ones(len(z), dtype=torch.bool))
    torch.testing.assert_close(found.weights, weights_of(y, classes, 0.0, weighted), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 50_000])
def test_row_weights_in_all_dtypes(classes, spread, dtype):
    """A tolerance that belongs to another dtype or width."""
    w = torch.linspace(0.1, 3.0, 64)
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    found, _, counted = reading(
        lambda z, y: (w * F.cross_entropy(z, y, reduction="none")).mean(),
        classes,
        spread=spread,
        dtype=dtype,
        scale=scale,
    )
    assert found.problem is None
    off = (found.weights / (scale * w / 64) - 1).abs()[counted]
    # Of a prediction that is sure the gradient may have lost its digits.
    assert float(off.median()) < (1e-3 if dtype == torch.float32 else 2e-2)
    assert float((off < 0.1).float().mean()) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [3, 1000, 50_000])
def test_a_cross_entropy_is_balanced_to_the_digits_of_its_dtype(classes, dtype):
    """The threshold that tells hidden states from logits, close to what rounding leaves."""
    z = torch.randn(64, classes, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    (2.0**14 * F.cross_entropy(z.float(), torch.arange(64) % classes)).backward()
    g = z.grad.float()
    assert float((g.sum(1).abs() / g.norm(dim=1)).median()) < BALANCE[dtype] / 4


@pytest.mark.parametrize("factor", [1e-3, 0.5, 1.0, 7.0, 1e3])
def test_soft_targets_of_a_peaked_teacher(factor):
    """Any factor of a loss with soft targets in every class taken for one."""
    teacher = torch.softmax(6 * torch.randn(64, 50, generator=torch.Generator().manual_seed(3)), -1)
    found, _, _ = reading(lambda z, y: F.cross_entropy(z, teacher), 50, scale=factor)
    read = torch.full((64,), 1 / 64) if found.weights is None else found.weights
    assert found.problem is None
    torch.testing.assert_close(read, torch.full((64,), factor / 64), rtol=0.02, atol=0.0)


def test_soft_targets_of_a_flat_teacher_are_said():
    """A weight that the gradient does not tell, guessed in silence."""
    teacher = torch.softmax(0.5 * torch.randn(64, 50, generator=torch.Generator().manual_seed(3)), -1)
    found, _, _ = reading(lambda z, y: 0.2 * F.cross_entropy(z, teacher), 50)
    assert found.problem is not None
    assert "soft targets" in found.problem.cause


@pytest.mark.parametrize("weight", [None, [1.0, 3.0]], ids=["mean", "weights of classes"])
def test_two_kinds_of_rows_of_two_classes(weight):
    """Two points lie on a line whatever they are: read as one smoothed label, with 18 times the weight."""
    z = torch.tensor([[0.0, 0.06]] * 16 + [[0.18, 0.0]] * 16, requires_grad=True)
    y = torch.tensor([0] * 16 + [1] * 16)
    w = None if weight is None else torch.tensor(weight)
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, y, w), z)
    reading = read_weights(gradient, probes_of(z), torch.ones(32, dtype=torch.bool))
    expected = torch.ones(32) if w is None else w[y]
    torch.testing.assert_close(reading.weights, expected / expected.sum(), rtol=1e-3, atol=0)


def test_answers_of_which_one_side_lies_on_a_line():
    """A NaN as the weight of all: every refresh is skipped."""
    z = torch.linspace(-2, 2, 24).reshape(12, 2).requires_grad_()
    y = torch.tensor([[1.0, 0.0]] * 6 + [[1.0, 1.0]] * 6)
    weight = torch.tensor([1.0, 6.0])
    loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    likelihood = Bernoulli()
    counted = torch.ones_like(y, dtype=torch.bool)
    weights = likelihood.weights(gradient, likelihood.probes(z), counted).weights
    torch.testing.assert_close(weights, torch.where(y == 1, weight, 1.0), rtol=1e-3, atol=0)
