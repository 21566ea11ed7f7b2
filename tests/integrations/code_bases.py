"""What a code base in small is, and how one is judged: its loop runs with one line changed, and the mean of h
is the exact Gauss-Newton diagonal of what that loop trains.

Each script keeps the order of things of its code base: what forward takes and returns, where the loss is
made, how the optimizer gets its parameters, when gradients are cleared, clipped and scaled. The loops are
generators that yield the loss after each step, so that a test can look at the state between two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracle import gauss_newton
from said import said
from sophia import Sophia

V, T, D = 9, 6, 8
"""Vocabulary, time, width."""
DRAWS = 220
SIGMAS = 4.5
TRACE = 0.07
MEASURED = {"betas": (0.9, 0.0), "update_every": 1, "fraction": 1.0}
"""With these h is the estimate of the last step; with lr = 0 all steps have the same weights."""

Loop = Callable[..., Iterator[Tensor]]


@dataclass(frozen=True)
class CodeBase:
    """A training script."""

    model: Callable[[], nn.Module]
    adamw: Callable[..., torch.optim.Optimizer]
    """``(model, lr=)``: the line as it stands there."""
    sophia: Callable[..., Sophia]
    """``(model, **settings)``: the line that takes its place."""
    train: Loop
    """``(model, optimizer, lr)``, a step at a time; ``compiled=True`` where the script can."""
    logits: Callable[[nn.Module], list[Any]]
    """All that the labels of a step answer to, nested, for each of the steps that come in turn."""
    loss: Callable[[Any, int], Tensor]
    """Of these, and the number of the step: all that it sums into ``.grad``."""
    counted: int
    """Labels in a step."""
    lr: float = 1e-2
    slack: float = 0.0
    """Of half precision."""


def check_that_it_trains(base: CodeBase, *, steps: int = 30, **settings) -> None:
    """The loop under its own line and under ours: nothing is said, and the loss falls under both."""
    for line in (base.adamw, base.sophia):
        torch.manual_seed(0)
        model = base.model()
        losses: list[float] = []

        def run(line=line, model=model, losses=losses) -> None:
            loop = base.train(model, line(model, lr=base.lr), base.lr, **settings)
            losses.extend(float(loss) for loss in itertools.islice(loop, steps))

        assert said(run) == []
        assert losses[-1] < 0.9 * losses[0], (line, losses[0], losses[-1])


def check_mean_of_h(base: CodeBase, *, draws: int = DRAWS, **settings) -> None:
    """B is right, nothing is said, and the mean of h is the oracle's: by trace, and tensor by tensor."""
    torch.manual_seed(0)
    model = base.model()
    steps = base.logits(model)
    every = [
        gauss_newton(model, (), lambda m, _, i=i: base.logits(m)[i], lambda z, _, i=i: base.loss(z, i))
        for i in range(len(steps))
    ]
    opt = base.sophia(model, lr=0.0, **MEASURED)
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in held}
    exact = {name: sum(each[name] for each in every) / len(every) for name in named}
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}

    def run() -> None:
        for _ in itertools.islice(base.train(model, opt, 0.0, **settings), draws):
            for name, p in named.items():
                sums[name] += opt.state[p]["hessian"].double() / draws

    assert said(run) == []
    assert opt.stats()["B"] == base.counted
    assert opt.stats()["skipped"] == 0
    trace = float(sum(sums[n].sum() for n in named) / sum(exact[n].sum() for n in named))
    assert 1 - TRACE < trace < 1 + TRACE
    allowed = SIGMAS * math.sqrt(2 / draws) + base.slack
    assert allowed < 0.45
    largest = max(float(e.norm()) for e in exact.values())
    for name in named:
        wrong = float((sums[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-6 * largest))
        assert wrong < allowed, (name, wrong, allowed)


def check_twins(
    base: CodeBase,
    first: dict[str, Any],
    second: dict[str, Any],
    *,
    other: CodeBase | None = None,
    steps: int = 4,
    lr: float = 1e-3,
    close: float = 1e-3,
) -> None:
    """Two ways to run a script, or another one, have the same h, number for number: both draw the same
    labels.
    """
    found = []
    for each, settings in ((base, first), (other or base, second)):
        torch.manual_seed(0)
        model = each.model()
        opt = each.sophia(model, lr=lr, update_every=1)
        words = said(
            lambda each=each, model=model, opt=opt, settings=settings: list(
                itertools.islice(each.train(model, opt, lr, **settings), steps)
            )
        )
        assert words == []
        found.append({n: opt.state[p]["hessian"] for n, p in model.named_parameters() if opt.state.get(p)})
    assert found[0].keys() == found[1].keys() != set()
    for name, h in found[0].items():
        assert float((found[1][name] - h).norm()) <= close * float(h.norm()), name


# ---- what small language models are made of ----


class Attention(nn.Module):
    """Two heads that look back."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, 2, D // 2).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, t, D))


class Block(nn.Module):
    """A layer of a decoder."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm, bias: bool = True) -> None:
        super().__init__()
        self.before, self.between = norm(D), norm(D)
        self.attention = Attention(bias)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D, bias=bias), nn.GELU(), nn.Linear(2 * D, D, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


def tokens(rows: int, time: int = T + 1, seed: int = 0) -> Tensor:
    """Ids that have something to be learned: often the last one, and one more."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (rows, time), generator=g)
    follows = torch.rand(rows, time, generator=g) < 0.7
    for t in range(1, time):
        ids[:, t] = torch.where(follows[:, t], (ids[:, t - 1] + 1) % V, ids[:, t])
    return ids


def pairs(number: int, rows: int, padding: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of ids and the ids that follow; with padding, in uneven lengths."""
    found = []
    for seed in range(number):
        ids = tokens(rows, seed=seed)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if padding is not None:
            lengths = 2 + (torch.arange(rows) + seed) % (T - 1)
            y = y.masked_fill(torch.arange(T)[None] >= lengths[:, None], padding)
        found.append((x, y))
    return found


def mean(logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    """Cross-entropy over the last dimension."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **settings)
