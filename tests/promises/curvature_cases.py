"""What a row of the tables of ordinary loops is, and how one is judged.

A case is a model, its data, the forwards of a step, the loss of them, and the loop if it is not the plain
one. It ends in one of two ways, and never in silence with another h:

curvature   the mean of the estimates of many steps is the oracle's diagonal (``oracle.gauss_newton``), and
            no warning was given but the one that the case names
told        an error or a warning that names the cause; with an error no weight has moved

Statistics: with betas = (0.9, 0) the state holds the estimate of the last step, with lr = 0 all steps have
the same weights. One estimate is a squared sum of many draws, near chi-square with one degree: a standard
deviation of sqrt(2) of its mean in every coordinate. For a tensor, the norm of the error of a mean of N
over the norm of the exact diagonal then is at most about sqrt(2 / N) in the root mean square, whatever the
correlation of the coordinates; 4.5 times that is allowed. A case whose estimates scatter more (few rows of a
cut batch, rare labels) says by how much in ``spread``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracle import gauss_newton
from said import said
from sophia import Sophia

DRAWS, SPREAD, SIGMAS = 400, math.sqrt(2), 4.5
ONE_STEP = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0), "update_every": 1}


@dataclass(frozen=True)
class Case:
    """An ordinary training loop."""

    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[[Any, Any], Tensor]
    """``(outputs, data) -> loss``: all that a step sums into ``.grad``."""
    outputs: Callable[[nn.Module, Any], Any] = lambda model, data: model(data[0])
    """All forwards of a step."""
    loop: Callable[[nn.Module, Sophia, Any, Case], None] | None = None
    """A step up to ``zero_grad``; None: one backward of the loss, then step."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    draws: int = DRAWS
    spread: float = SPREAD
    slack: float = 0.0
    """Of half precision."""
    warns: str | None = None
    """What is said once; None: nothing."""

    def step(self, model: nn.Module, opt: Sophia, data: Any) -> None:
        """One training step."""
        if self.loop is None:
            self.loss(self.outputs(model, data), data).backward()
            opt.step()
        else:
            self.loop(model, opt, data, self)
        opt.zero_grad()

    def exact(self) -> dict[str, Tensor]:
        """The oracle."""
        torch.manual_seed(0)
        return gauss_newton(self.model(), self.data(), self.outputs, self.loss)


def mean_estimate(case: Case) -> tuple[dict[str, Tensor], list[str], dict[str, float]]:
    """Mean of h by name of the parameter, what was said, and the last ``stats()``."""
    torch.manual_seed(0)
    model = case.model()
    data = case.data()
    opt = Sophia(model, **{**ONE_STEP, "fraction": 1.0, **case.settings})
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}

    def run() -> None:
        for _ in range(case.draws):
            case.step(model, opt, data)
            for name, p in model.named_parameters():
                if "hessian" in opt.state.get(p, ()):
                    sums[name] += opt.state[p]["hessian"]

    words = said(run)
    trained = {id(p) for group in opt.param_groups for p in group["params"]}
    held = {name for name, p in model.named_parameters() if id(p) in trained}
    return {n: s / case.draws for n, s in sums.items() if n in held}, words, opt.stats()


def differences(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor, the norm of the error over that of the exact diagonal."""
    largest = max(float(e.norm()) for e in exact.values())
    return {
        # a bias before a normalisation has no curvature: there, over a millionth of the largest tensor's
        name: float((found[name].double() - e).norm() / e.norm().clamp(min=1e-6 * largest))
        for name, e in exact.items()
    }


def ratio(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Trace over trace."""
    return float(sum(found[name].sum() for name in exact) / sum(e.sum() for e in exact.values()))


def tolerance(case: Case) -> float:
    """Of ``differences``."""
    allowed = SIGMAS * case.spread / math.sqrt(case.draws) + case.slack
    assert allowed < 0.45, f"{case.draws} draws cannot tell a half from a whole"
    return allowed


def check_curvature(case: Case) -> dict[str, float]:
    """The mean of h is the oracle's, with the words of the case and no others; returns the statistics."""
    exact = case.exact()
    return judged(case, exact, *mean_estimate(case))


def judged(
    case: Case, exact: Mapping[str, Tensor], found: Mapping[str, Tensor], words: list[str], stats: Any
) -> dict[str, float]:
    """AssertionError with the ratio that was seen, or the statistics."""
    wrong = {name: f"{d:.2f}" for name, d in differences(found, exact).items() if not d < tolerance(case)}
    unheard = wrong_words(words, case.warns)
    if wrong or unheard:
        raise AssertionError(
            f"trace {ratio(found, exact):.3g} of the exact one; off by {wrong} of the exact norms, "
            f"{tolerance(case):.2f} allowed; skipped {stats['skipped']:g}. {unheard}"
        )
    return stats


def wrong_words(words: list[str], pattern: str | None) -> str:
    """Why these are not the words of a case: nothing said, or one sentence of that kind, once."""
    if pattern is None:
        return f"no cause for words, but: {words}" if words else ""
    fits = len(words) == 1 and re.search(pattern, words[0], re.I)
    return "" if fits else f"expected one sentence about {pattern!r}, heard {words}"


def outcome(run: Callable[[], Any]) -> tuple[str | None, list[str]]:
    """The error in which a run ended, if it did, and the warnings before it."""
    raised: list[str] = []

    def guarded() -> None:
        try:
            run()
        except (RuntimeError, ValueError, TypeError) as error:
            raised.append(f"{type(error).__name__}: {error}")

    heard = said(guarded)
    return (raised[0] if raised else None), heard


def check_told(case: Case, words: str, *, kind: str = "either", steps: int = 3) -> None:
    """An error or a warning that names the cause, at the first due step; with an error nothing has moved.

    ``kind``: "error", "warning", or "either" where both keep the promise.
    """
    torch.manual_seed(0)
    model, data = case.model(), case.data()
    before = [p.detach().clone() for p in model.parameters()]
    opt = Sophia(model, **{"lr": 0.01, "update_every": 1, **case.settings})
    raised, heard = outcome(lambda: [case.step(model, opt, data) for _ in range(steps)])
    told = ([] if kind == "error" else heard) + ([] if kind == "warning" or raised is None else [raised])
    assert any(re.search(words, each, re.I | re.S) for each in told), (
        f"expected {kind} about {words!r}; raised: {raised}; heard: {heard}"
    )
    if raised is not None:
        for p, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.detach(), value), "weights moved before the error"


def check_curvature_or_told(case: Case, words: str) -> None:
    """Where a way may not be readable: the oracle's h, or words that name the cause. Never neither."""
    got: list[Any] = []
    raised, _ = outcome(lambda: got.append(mean_estimate(case)))
    heard = [raised] if raised is not None else got[0][1]
    if not any(re.search(words, each, re.I | re.S) for each in heard):
        assert raised is None, f"expected {words!r}, raised: {raised}"
        judged(case, case.exact(), *got[0])


# ---- small models and data ----


def classifier(inputs: int = 4, hidden: int = 6, classes: int = 5) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def rows(n: int = 13, inputs: int = 4, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Random inputs of rather unlike rows, so that the weight of a row shows, and labels."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, inputs, generator=g) * torch.linspace(0.3, 2.0, n)[:, None]
    return x, torch.randint(0, classes, (n,), generator=g)


class Words(nn.Module):
    """Logits ``(B, T, 7)`` of a token and all before it."""

    vocabulary = 7

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids).cumsum(1)))


def sentences(lengths: tuple[int, ...] = (6, 4, 2, 1), time: int = 6) -> tuple[Tensor, Tensor]:
    """Ids, and targets that are -100 from each row's length on."""
    g = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(0, Words.vocabulary, (len(lengths), time + 1), generator=g)
    past = torch.arange(time)[None] >= torch.tensor(lengths)[:, None]
    return ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(past, -100)


def cross_entropy(outputs: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    """Over the last dimension, whatever the others."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), **settings)


def per_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """Losses of the shape of the targets."""
    return cross_entropy(outputs, targets, reduction="none").view(targets.shape)
