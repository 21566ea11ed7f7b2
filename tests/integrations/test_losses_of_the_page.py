"""docs/losses.md: the examples that need nothing but torch, as they stand, and what was counted in them."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n[^#]*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
STEPS = 11  # refreshes at the first and the last


def run(title, counted, **names):
    """Run an example; two refreshes, of as many predictions in the last."""
    torch.manual_seed(0)
    names = {"Sophia": Sophia, "torch": torch, "cross_entropy": F.cross_entropy, **names}
    exec(compile(EXAMPLES[title], f"docs/losses.md: {title}", "exec"), names)
    assert (names["opt"].stats()["refreshes"], names["opt"].stats()["B"]) == (2, counted)
    assert all(bool(names["opt"].state[p]["hessian"].any()) for p in names["opt"].state if p.ndim > 1)


def net(outputs, inputs=4):
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def test_a_teacher():
    """An eighth of 16 rows."""
    batches = [(torch.randn(16, 4), torch.randint(0, 5, (16,)))] * STEPS
    run("A teacher", 2, model=net(5), teacher=net(5).requires_grad_(False), batches=batches)


def test_label_sequences():
    """Frames of one of eight utterances, all of one length."""
    sounds, labels = torch.randn(8, 12, 4), torch.randint(1, 9, (8, 4))
    batch = (sounds, labels, torch.full((8,), 12), torch.full((8,), 4))
    run("Label sequences (CTC)", 12, model=net(9), batches=[batch] * STEPS)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(4, 5)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


def test_weights_that_no_gradient_tells():
    """Four numbers of each of two rows."""
    batches = [(torch.randn(16, 4), torch.rand(16), torch.randn(16, 4))] * STEPS
    run("Weights that no gradient tells", 8, model=Denoiser(), weight_at=lambda t: t + 0.1, batches=batches)


def test_preference_pairs():
    """Two of 16 pairs."""

    def log_probability(policy, text):
        z = policy(text.float())
        return torch.log_softmax(z, -1).gather(1, text[:, :1]).squeeze(1)

    batch = (torch.randint(0, 5, (16, 4)), torch.randint(0, 5, (16, 4)), torch.randn(16))
    run("Preference pairs", 2, policy=net(5), log_probability=log_probability, batches=[batch] * STEPS)


def test_a_reward_model(recwarn):
    """All eight pairs of 16 rows, which is said."""
    run("A reward model", 8, model=net(1), batches=[torch.randn(16, 4)] * STEPS)
    assert len(recwarn) == 1
    assert "not independent" in str(recwarn[0].message)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text, self.scale = net(5), net(5), nn.Parameter(torch.tensor(1.0))

    def forward(self, images, texts):
        return self.image(images), self.text(texts)


def test_contrast():
    """Both directions of eight rows."""
    run("Contrast", 16, model=Towers(), batches=[(torch.randn(8, 4), torch.randn(8, 4))] * STEPS)


def test_by_hand():
    """The same, from two forwards."""
    run("By hand", 16, model=net(5), batches=[(torch.randn(8, 4), torch.randn(8, 4))] * STEPS)
