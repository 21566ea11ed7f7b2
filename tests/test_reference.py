"""The library against Sophia as one plain loop (``sophia.reference``), step by step."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import sophia
from sophia import Sophia, reference
from sophia.likelihoods import Categorical
from tiny import Bare, data

STEPS, ROWS = 7, 8
# Refreshes at steps 1, 4 and 7. This gamma leaves about half of the coordinates unclipped, and this eps rules
# a few: those whose gradient is rounding alone (the keys' bias), so that float32 can be compared.
PLAIN = {"eta": 1e-2, "lambda_": 0.1, "beta1": 0.9, "beta2": 0.95, "gamma": 3.0, "eps": 5e-6, "k": 3}
LIBRARY = {
    "lr": PLAIN["eta"],
    "weight_decay": PLAIN["lambda_"],
    "betas": (PLAIN["beta1"], PLAIN["beta2"]),
    "gamma": PLAIN["gamma"],
    "eps": PLAIN["eps"],
    "update_every": PLAIN["k"],
}


class Heard(Categorical):
    """Single labels, as the library draws them, and the probabilities they were drawn with, kept."""

    def __init__(self):
        super().__init__(pairs=0)
        self.probabilities, self.labels = [], []

    def draw(self, probabilities, uniforms):
        labels = super().draw(probabilities, uniforms)
        self.probabilities.append(probabilities.clone())  # they become the gradient, in place
        self.labels.append(labels)
        return labels


def batches(padded):
    x, y = data(STEPS * ROWS, padded=padded, seed=3)
    y = y.masked_fill(y < 0, reference.IGNORED)
    return list(zip(x.split(ROWS), y.split(ROWS), strict=True))


def by_the_library(dtype, sizes, *, padded):
    """Weights and h after each step, and the labels drawn; ``sizes`` are those of the micro-batches."""
    model, heard = Bare().to(dtype), Heard()
    opt = Sophia(model.parameters(), model=model, fraction=1.0, likelihood=heard, **LIBRARY)
    after = []
    for x, y in batches(padded):
        opt.zero_grad()
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            loss = F.cross_entropy(model(xs).flatten(0, 1), ys.flatten(), reduction="sum")
            (loss / (y != reference.IGNORED).sum()).backward()
        opt.step()
        h = [opt.state[p]["hessian"].flatten() for p in model.parameters()]
        after.append((parameters_to_vector(model.parameters()).detach().clone(), torch.cat(h)))
    assert opt.stats()["refreshes"] == 3
    assert 0.3 < opt.stats()["unclipped"] < 0.7  # else the curvature would hardly matter, or the clip
    return after, heard


def by_the_loop(loop, dtype, heard, *, padded):
    """The same by the plain loop, with the labels that the library drew."""
    model = Bare().to(dtype)
    probabilities, labels = torch.cat(heard.probabilities), torch.cat(heard.labels)
    used = 0

    def draw(p):
        nonlocal used
        part = slice(used, used + len(p))
        used += len(p)
        torch.testing.assert_close(p, probabilities[part], **TOLERANCES[dtype]["weights"])
        return labels[part]

    after = [
        (parameters_to_vector(model.parameters()).detach().clone(), h)
        for _, h in loop(model, batches(padded), draw=draw, **PLAIN)
    ]
    assert used == len(labels)
    return after


def assert_same(found, expected):
    for step, (ours, plain) in enumerate(zip(found, expected, strict=True), start=1):
        for name, a, b in zip(("weights", "h"), ours, plain, strict=True):
            torch.testing.assert_close(
                a, b, **TOLERANCES[a.dtype][name], msg=lambda m, at=f"{name}, step {step}": f"{at}: {m}"
            )


TOLERANCES = {
    torch.float64: {"weights": {"rtol": 0, "atol": 1e-13}, "h": {"rtol": 1e-10, "atol": 1e-16}},
    torch.float32: {"weights": {"rtol": 0, "atol": 1e-5}, "h": {"rtol": 1e-3, "atol": 1e-9}},  # lr is 1e-2
}
CUTS = {
    "one micro-batch": ([8], False),
    "four micro-batches": ([2, 2, 2, 2], False),
    "padding, unequal micro-batches": ([1, 4, 3], True),
}


@pytest.mark.parametrize(("sizes", "padded"), CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_library_is_the_plain_loop(dtype, sizes, padded):
    """Anything in the library, from hooks to kernel, that makes it another algorithm than the paper's: h, B,
    the order of lines, a stale theta, the probabilities of the labels.
    """
    found, heard = by_the_library(dtype, sizes, padded=padded)
    assert_same(found, by_the_loop(reference.train, dtype, heard, padded=padded))


REFRESH = """        if (t - 1) % k == 0:  # t mod k = 1; else h_t = h_{t-1}
            h_hat = gauss_newton_bartlett(model, x, y, draw)
            h = beta2 * h + (1 - beta2) * h_hat
"""
WRITE = "        vector_to_parameters(theta, model.parameters())  # theta_{t+1}\n"
DECAY = "        theta = theta - eta * lambda_ * theta\n"
MUTATIONS = {
    "no factor B": [("return B * g_hat * g_hat", "return g_hat * g_hat")],
    "B counts padding": [("B = len(logits)", "B = y.numel()")],
    "B is the number of sequences": [("B = len(logits)", "B = len(x)")],
    "refresh after the step": [(REFRESH, ""), (WRITE, WRITE + REFRESH)],
    "refresh a step late": [("(t - 1) % k", "(t - 2) % k")],
    "training labels": [("cross_entropy(logits, y_hat)", "cross_entropy(logits, y[y != IGNORED])")],
    "bias correction": [("= gauss_newton_bartlett(", "= 1 / (1 - beta2) * gauss_newton_bartlett(")],
    "m of the step before": [("(m / (gamma", "((m - (1 - beta1) * g) / beta1 / (gamma")],
    "decay after the step": [(DECAY, ""), (WRITE, DECAY + WRITE)],
    "eps added": [("(gamma * h).clamp(min=eps)", "(gamma * h + eps)")],
    "no clip": [(".clamp(-1, 1)", "")],
}


@pytest.fixture(scope="module")
def heard():
    return by_the_library(torch.float64, [1, 4, 3], padded=True)


@pytest.mark.parametrize("edits", MUTATIONS.values(), ids=MUTATIONS)
def test_another_algorithm_is_told_apart(heard, edits):
    """The test above would hold nothing if a changed line of the loop went unseen."""
    text = Path(reference.__file__).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    changed = types.ModuleType("changed")
    exec(compile(text, "changed", "exec"), changed.__dict__)
    with pytest.raises(AssertionError):
        assert_same(heard[0], by_the_loop(changed.train, torch.float64, heard[1], padded=True))


def test_it_runs_by_itself_and_learns():
    """A reader's first command failing, or a loss that does not fall."""
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sophia.reference"], capture_output=True, text=True, check=True
    ).stdout
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert losses[0] > 2.2  # eleven characters: ln 11 = 2.4
    assert losses[-1] < 0.2


def test_it_names_files_that_exist():
    """A file moved without the list of what the library does otherwise."""
    named = re.findall(r"[\w/]+\.py\b|[\w/]+/(?=\))", reference.__doc__)
    assert len(named) > 8
    source = Path(sophia.__file__).parent
    missing = [name for name in named if not (source / name).exists() and not name.startswith("tests/")]
    assert not missing
