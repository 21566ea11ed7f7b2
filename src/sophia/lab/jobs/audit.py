# mypy: disable-error-code="no-untyped-call"
"""Audit of an optimizer: is it Sophia? It is fed a problem whose curvature is known exactly, and its h is
read from its steps.

The problem is one linear layer under a softmax: there the Gauss-Newton diagonal is the Hessian's, and it is
``mean over tokens of p (1 - p) x^2``. The optimizer is driven through many refreshes with learning rate 0, in
the ways in which people write the loop, right and wrong. Then one probe step with a known tiny gradient,
momentum off and learning rate 1 moves each coordinate by ``g / (gamma h)`` unless it is clipped: so h is seen
from outside, whatever the class calls its buffers. ``h / truth`` should be 1.

What is asked of a class: ``betas=(0, ...)`` is accepted, and parameter groups carry ``lr``. A scale in front
of h is read from ``gamma`` or ``rho`` of the group; classes that have none (``clip(m / h, p)``) need none.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophia.lab.support.errors import LabError, UsageError

__all__ = ["Finding", "Problem", "audit", "conclusion"]

SEQUENCES, LENGTH, WIDTH, CLASSES, PARTS = 16, 16, 6, 5, 8
BETA2, REFRESHES = 0.99, 800  # the sum of h then has a relative standard deviation of 3%
TOLERANCE = 0.15
_B = SEQUENCES * LENGTH


@dataclass(frozen=True)
class Finding:
    """Result of one way of calling the optimizer."""

    case: str
    """How the loop was written."""
    right: bool
    """Whether that is a right way, for this kind of class; wrong ones show what the mistake costs."""
    ratio: float | None
    """Sum of h over sum of the truth; 0 if h was never refreshed; None if the loop could not be run."""
    correlation: float | None
    """Of h with the truth, over the coordinates."""
    note: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.ratio is None:
            return "does not run"
        if self.ratio == 0:
            return "h never refreshed: sign momentum"
        if abs(self.ratio - 1) <= TOLERANCE and (self.correlation or 0) > 0.8:
            return "Sophia"
        if (self.correlation or 0) <= 0.8:
            return "h is something else"
        return f"h is {self.ratio:.3g} times the curvature"


class Problem(nn.Module):
    """Tokens ``x`` (SEQUENCES, LENGTH, WIDTH), a linear softmax model, and training labels that are not its
    own.
    """

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        scales = torch.logspace(-0.5, 0.5, WIDTH, dtype=torch.float64)
        self.linear = nn.Linear(WIDTH, CLASSES, bias=False, dtype=torch.float64)
        self.linear.weight.data = torch.randn(CLASSES, WIDTH, generator=g, dtype=torch.float64)
        self.x = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=g, dtype=torch.float64) * scales
        self.y = torch.randint(CLASSES, (SEQUENCES, LENGTH), generator=g) % 3
        if padded:
            self.y[::2, LENGTH // 4 :] = -100
        self.labels = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor, last_only: bool = False) -> Tensor:
        logits: Tensor = self.linear(x[:, -1:] if last_only else x)
        return logits

    def truth(self) -> Tensor:
        """The exact diagonal, of the shape of the weight."""
        keep = self.y >= 0
        p = torch.softmax(self(self.x)[keep].detach(), -1)
        return (p * (1 - p)).T @ self.x[keep].square() / int(keep.sum())

    def training_loss(self, rows: slice = slice(None)) -> Tensor:
        """Mean cross-entropy on the training labels."""
        return F.cross_entropy(self(self.x[rows]).flatten(0, 1), self.y[rows].flatten())

    def sampled_loss(self, rows: slice = slice(None), *, last_only: bool = False) -> Tensor:
        """Mean cross-entropy on labels drawn from the model."""
        logits = self(self.x[rows], last_only).flatten(0, 1)
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=self.labels)[:, 0]
        return F.cross_entropy(logits, drawn)


_ROWS = [slice(i * SEQUENCES // PARTS, (i + 1) * SEQUENCES // PARTS) for i in range(PARTS)]


@dataclass(frozen=True)
class _Case:
    name: str
    right: bool
    loop: Callable[[Problem, Any], None]
    padded: bool = False
    predictions: int | None = _B
    """B that the loop hands to ``step(bs=...)``, if step takes one; None to leave its default."""


def _plain(problem: Problem, opt: Any) -> None:
    problem.training_loss().backward()
    opt.step()
    opt.zero_grad()


def _create_graph(problem: Problem, opt: Any) -> None:
    problem.training_loss().backward(create_graph=True)
    opt.step()
    opt.zero_grad()


def _accumulated(problem: Problem, opt: Any) -> None:
    for rows in _ROWS:
        (problem.training_loss(rows) / PARTS).backward()
    opt.step()
    opt.zero_grad()


def _scaled(problem: Problem, opt: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(problem.training_loss()).backward()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


LOOPS = (
    _Case("plain loop", True, _plain),
    _Case("8 micro-batches", True, _accumulated),
    _Case("padding", True, _plain, padded=True),
    _Case("GradScaler", True, _scaled),
)
"""For classes that refresh by themselves: every one of these loops should give the curvature."""


def _by_hand(gradient: Callable[[Problem, Any], None]) -> Callable[[Problem, Any], None]:
    """The calls of the official repository: backward of a sampled loss, then ``update_hessian()``."""

    def loop(problem: Problem, opt: Any) -> None:
        gradient(problem, opt)
        opt.update_hessian()
        opt.zero_grad()

    return loop


def _sum_of_parts(problem: Problem, opt: Any) -> None:
    for rows in _ROWS:
        problem.sampled_loss(rows).backward()


def _square_of_each(problem: Problem, opt: Any) -> None:
    for rows in _ROWS[:-1]:
        problem.sampled_loss(rows).backward()
        opt.update_hessian()
        opt.zero_grad()
    problem.sampled_loss(_ROWS[-1]).backward()


BY_HAND = (
    _Case("B = tokens, one pass", True, _by_hand(lambda p, _: p.sampled_loss().backward())),
    _Case("plain loop, update_hessian() never called", False, _plain),
    _Case(
        "logits of the last position only",
        False,
        _by_hand(lambda p, _: p.sampled_loss(last_only=True).backward()),
    ),
    _Case(
        "last micro-batch only, loss / 8",
        False,
        _by_hand(lambda p, _: (p.sampled_loss(_ROWS[-1]) / PARTS).backward()),
    ),
    _Case("8 micro-batch means added up", False, _by_hand(_sum_of_parts)),
    _Case("square of each micro-batch", False, _by_hand(_square_of_each)),
    _Case("B = sequences", False, _by_hand(lambda p, _: p.sampled_loss().backward()), predictions=SEQUENCES),
    _Case("default bs", False, _by_hand(lambda p, _: p.sampled_loss().backward()), predictions=None),
    _Case("GradScaler, not unscaled", False, _by_hand(lambda p, _: (p.sampled_loss() * 2.0**16).backward())),
    _Case("training labels", False, _by_hand(lambda p, _: p.training_loss().backward())),
)
"""For classes with ``update_hessian()``: one right way, and the mistakes found in public code."""

SECOND_ORDER = (_Case("backward(create_graph=True)", True, _create_graph), _Case("plain loop", False, _plain))
"""For classes that differentiate the gradient again inside ``step()``."""


def audit(
    make: Callable[..., Any], *, second_order: bool = False, refreshes: int = REFRESHES
) -> list[Finding]:
    """Drive ``make(parameters, lr=..., betas=...)`` (or ``make(model, ...)``) through the cases of its kind.

    Args:
        make: the class.
        second_order: whether it needs ``backward(create_graph=True)``.
        refreshes: steps of each case; an interval argument (``update_every``, ``update_period``) is set to 1
        if there is one.
    """
    if second_order:
        cases: tuple[_Case, ...] = SECOND_ORDER
    else:
        cases = BY_HAND if hasattr(make, "update_hessian") else LOOPS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of thirty numbers: more threads only wait for each other
    try:
        return [_run(case, make, refreshes) for case in cases]
    finally:
        torch.set_num_threads(threads)


def _run(case: _Case, make: Callable[..., Any], refreshes: int) -> Finding:
    problem = Problem(padded=case.padded)
    try:
        opt = _build(make, problem)
    except UsageError:
        raise
    except Exception as error:
        raise LabError(f"{make!r} could not be built ({type(error).__name__}: {error}).") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(refreshes):
                case.loop(problem, opt)
            truth = problem.truth()
            found = _curvature(problem, opt, case)
    except Exception as error:  # a class that fails in a loop has failed the case, not the audit
        return Finding(case.name, case.right, None, None, f"{type(error).__name__}: {error}"[:200])
    if found is None:
        return Finding(case.name, case.right, 0.0, None)
    correlation = float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1])
    return Finding(case.name, case.right, float(found.sum() / truth.sum()), correlation)


def _build(make: Callable[..., Any], problem: Problem) -> Any:
    names = inspect.signature(make).parameters
    settings: dict[str, Any] = {"lr": 1.0, "betas": (0.0, BETA2), "weight_decay": 0.0}
    settings = {name: value for name, value in settings.items() if name in names}
    if "betas" not in settings:
        raise UsageError(
            f"{make!r} takes no betas, so its momentum cannot be switched off and its h cannot be read from "
            "outside. Write a subclass that takes betas=(beta1, beta2)."
        )
    settings |= {name: 1 for name in ("update_every", "update_period") if name in names}
    settings |= {"fraction": 1.0} if "fraction" in names else {}
    try:
        opt = make(problem.parameters(), **settings)
    except ValueError:
        opt = make(problem, **settings)  # a drop-in that wants the model
    for group in opt.param_groups:
        group["lr"] = 0.0
    return opt


def _curvature(problem: Problem, opt: Any, case: _Case) -> Tensor | None:
    """The h that the step uses, or None if every coordinate moves by the full learning rate."""
    weight = problem.linear.weight
    weight.data.zero_()  # so that the smallest move is seen in full precision
    group = opt.param_groups[0]
    scale = float(group.get("gamma", group.get("rho", 1.0)))
    group["lr"] = 1.0
    # Far below any denominator of this problem, so that a coordinate with an h is not clipped.
    gradient = 1e-9
    if "update_every" in group:
        group["update_every"] = 2**30  # the probe must not refresh
    weight.grad = torch.full_like(weight, gradient)
    if case.loop is _create_graph:
        # The same gradient, at weight zero, with a graph to differentiate and next to no curvature.
        weight.grad = None
        (gradient * weight.sum() + 1e-30 * weight.square().sum()).backward(create_graph=True)
    parameters = inspect.signature(opt.step).parameters
    opt.step(bs=case.predictions) if "bs" in parameters and case.predictions else opt.step()
    moved = weight.detach().abs()
    if not torch.isfinite(moved).all() or float(moved.max()) == 0:
        raise LabError("the probe step moved nothing, or not finitely")
    if float((moved / moved.max()).min()) > 1 - 1e-6:
        return None
    return gradient / moved / scale


def conclusion(findings: list[Finding]) -> str:
    """One sentence over all cases."""
    right = [finding for finding in findings if finding.right]
    good = [finding for finding in right if finding.verdict == "Sophia"]
    if len(good) == len(right):
        return f"Sophia in {len(good)} of {len(right)} right ways of calling it"
    worst = max(right, key=lambda finding: math.inf if not finding.ratio else abs(math.log(finding.ratio)))
    bad = f"{len(right) - len(good)} of {len(right)}"
    return f"not Sophia in {bad} right ways of calling it; worst: {worst.case}, {worst.verdict}"
