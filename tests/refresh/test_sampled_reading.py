"""Weights read from a sample of the predictions: as exact as from all, and not trusted once they differ."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.refresh import sampled_reading

N, CLASSES = 2048, 5
CLASS_WEIGHTS = torch.tensor([1.0, 4.0, 0.5, 2.0, 1.0])


def made(**settings):
    torch.manual_seed(0)
    model = nn.Linear(3, CLASSES)
    return model, Sophia(model, lr=0.0, betas=(0.9, 0.0), update_every=1, **settings)


def batch(counted=1.0):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 3, generator=g), torch.randint(0, CLASSES, (N,), generator=g)
    y[int(counted * N) :] = -100
    return x, y


def step(model, opt, x, y, scale=1.0, weight=None):
    (F.cross_entropy(model(x), y, weight=weight) * scale).backward()
    recording = opt._recorder.recordings[0].outputs[0]
    opt.step()
    opt.zero_grad()
    return recording


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_a_sample_reads_what_all_predictions_say(scale, monkeypatch):
    """Off by the share of the sample, or of the loss of the step before."""
    model, opt = made()
    x, y = batch(0.5)
    read = [step(model, opt, x, y, scale) for _ in range(3)]
    assert [r.sample is None for r in read] == [True, False, False]
    for recording in read:
        torch.testing.assert_close(recording.weights, (y >= 0) * (scale / (N / 2)), rtol=1e-5, atol=0)
    h = opt.state[model.weight]["hessian"].clone()
    monkeypatch.setattr("sophia.optimizer.ALL_AGAIN", 1)
    model, opt = made()
    assert all(step(model, opt, x, y, scale).sample is None for _ in range(3))
    torch.testing.assert_close(h, opt.state[model.weight]["hessian"], rtol=1e-5, atol=0)


def test_weights_that_differ_again_stand_for_the_others_and_are_read_in_full_next():
    """A loss that changes its weights between two refreshes: the sample alone, unbiased, then all."""
    model, opt = made(fraction=1.0)
    x, y = batch()
    found = []
    for _ in range(300):
        step(model, opt, x, y)
        after = []
        for _ in range(2):
            recording = step(model, opt, x, y, weight=CLASS_WEIGHTS)
            after.append(recording.sample is None)
            if recording.sample is not None:
                assert int((recording.weights > 0).sum()) == len(recording.sample)
                found.append(opt.state[model.bias]["hessian"].clone())
        assert after[1], "they were seen to differ"
    assert len(found) > 250
    total = sum(found) / len(found)
    p = torch.softmax(model(x).detach(), -1)
    w = CLASS_WEIGHTS[y] / CLASS_WEIGHTS[y].sum()
    torch.testing.assert_close(total, (w[:, None] * p * (1 - p)).sum(0), rtol=0.3, atol=0)


def test_few_counted_predictions_are_all_read():
    """A sample that may find none of them."""
    model, opt = made()
    x, y = batch(0.1)
    assert all(step(model, opt, x, y).sample is None for _ in range(3))


def test_all_are_read_now_and_then():
    """A rare weight that no sample has met."""
    model, opt = made()
    x, y = batch()
    every = sampled_reading.ALL_AGAIN
    read = [step(model, opt, x, y).sample is None for _ in range(2 * every + 1)]
    assert [i for i, whole in enumerate(read) if whole] == [0, every, 2 * every]


@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_run_reads_as_the_other_does(at):
    """A first refresh after loading that reads all again: rounding would tell the two apart."""
    model, opt = made()
    x, y = batch()
    for _ in range(at):
        step(model, opt, x, y)
    saved = copy.deepcopy(opt.state_dict())
    step(model, opt, x, y)
    other = Sophia(model, lr=0.0, betas=(0.9, 0.0), update_every=1)
    other.load_state_dict(saved)
    opt.detach()
    assert step(model, other, x, y).sample is not None
    assert torch.equal(opt.state[model.weight]["hessian"], other.state[model.weight]["hessian"])
