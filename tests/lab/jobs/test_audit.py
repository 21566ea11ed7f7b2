"""The audit must see the known mistakes, in the size in which they are known, and clear what is right."""

import pytest
import torch

from sophia import Sophia
from sophia.lab.jobs.audit import BY_HAND, Finding, audit, conclusion
from sophia.lab.support.errors import UsageError
from sophia.lab.support.import_by_path import load_class


class CallPattern(torch.optim.Optimizer):
    """The public interface of the official repository, from its formula: B is an argument of ``step``."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    def _rows(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("exp_avg", torch.zeros_like(p))
                    yield group, p, p.grad, state, state.setdefault("hessian", torch.zeros_like(p))

    @torch.no_grad()
    def update_hessian(self):
        for group, _, grad, _, hessian in self._rows():
            hessian.lerp_(grad.square(), 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group, p, grad, state, hessian in self._rows():
            state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
            ratio = (state["exp_avg"].abs() / (group["rho"] * bs * hessian + 1e-15)).clamp(max=1)
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                group["lr"] * state["exp_avg"].sign() * ratio
            )


# What each mistake does to h, from its arithmetic: T = 16 positions, 16 sequences, 8 micro-batches.
EXPECTED = {
    "B = tokens, one pass": 1.0,
    "plain loop, update_hessian() never called": 0.0,
    "last micro-batch only, loss / 8": 1 / 8,
    "8 micro-batch means added up": 64.0,
    "square of each micro-batch": 8.0,
    "B = sequences": 1 / 16,
    "default bs": 5120 / 256,
    "GradScaler, not unscaled": 2.0**32,
}


@pytest.fixture(scope="module")
def by_hand():
    return {finding.case: finding for finding in audit(CallPattern)}


@pytest.mark.parametrize(("case", "expected"), EXPECTED.items())
def test_known_mistakes_are_measured(by_hand, case, expected):
    """An audit that reports another size than the mistake has accuses or clears the wrong class."""
    assert by_hand[case].ratio == pytest.approx(expected, rel=0.25)


def test_training_labels_are_recognised_as_something_else(by_hand):
    """A large scale alone would invite a smaller gamma; the shape is wrong too."""
    assert by_hand["training labels"].verdict == "h is something else"
    assert not by_hand["training labels"].right


def test_ours_is_sophia_in_every_loop():
    """The library's promise, through the instrument that judges others."""
    findings = audit(Sophia)
    assert [finding.verdict for finding in findings] == ["Sophia"] * 4
    assert conclusion(findings) == "Sophia in 4 of 4 right ways of calling it"


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.NAdam])
def test_adam_is_not_sophia(make):
    """A second moment of training gradients would pass for a curvature."""
    findings = audit(make, refreshes=200)
    assert all(finding.verdict == "h is something else" for finding in findings)
    assert conclusion(findings).startswith("not Sophia in 4 of 4")


def test_a_class_that_fails_in_the_loop_fails_the_case_not_the_audit():
    """One broken way of calling must not hide the others."""

    class Broken(CallPattern):
        def update_hessian(self):
            raise KeyError("momentum")

    findings = audit(Broken, refreshes=3)
    assert len(findings) == len(BY_HAND)
    assert findings[0].verdict == "does not run"
    assert "momentum" in findings[0].note


MESSAGES = [
    ("sophia", "does not name a class or function. Write module:name"),
    ("no_such_module_here:X", "cannot be imported"),
    ("sophia:Nothing", "has no 'Nothing'"),
    ("sophia:__version__", "is a str, not a class"),
]


@pytest.mark.parametrize(("path", "text"), MESSAGES)
def test_bad_paths_are_explained(path, text):
    """Each message is read at least here."""
    with pytest.raises(UsageError, match=text):
        load_class(path)


def test_without_betas_nothing_can_be_read():
    """SGD has no h; a number printed for it would be an invention."""
    with pytest.raises(UsageError, match="takes no betas"):
        audit(torch.optim.SGD)


def test_the_worst_right_way_is_named():
    """The sentence is what people quote."""
    findings = [Finding("a", True, 0.5, 0.99), Finding("b", True, 0.0, None), Finding("c", False, 9.0, 0.9)]
    assert conclusion(findings) == (
        "not Sophia in 2 of 2 right ways of calling it; worst: b, h never refreshed: sign momentum"
    )
