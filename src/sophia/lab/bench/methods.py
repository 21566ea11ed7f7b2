"""The optimizers that are timed, a row each: what it is, which package it needs, and how a loop calls it.

A trainer takes whole training steps as the optimizer's users write them. Where there is a curvature, every
second step renews it, the first one among them, so that steps with and without are timed side by side; what
any interval k costs follows from the two.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from sophia import Sophia
from sophia.lab.bench.official_rule import OfficialRule
from sophia.lab.bench.problem import Problem
from sophia.lab.optimizers.pair import Pair

__all__ = ["METHODS", "REFERENCE", "Method", "Trainer"]

LR = 1e-4
REFERENCE = "adamw fused"


class Trainer:
    """A loop around one optimizer: forward, backward, clipping, step."""

    refreshes = False
    """Whether every second step, from the first, renews a curvature."""

    def __init__(self, problem: Problem, optimizer: Optimizer) -> None:
        self.problem, self.optimizer = problem, optimizer
        self.parameters = [p for p in problem.model.parameters() if p.requires_grad]

    def step(self) -> None:
        """One training step."""
        self.problem.loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ready_for_steps_alone(self) -> None:
        """Leave gradients in place for ``step_alone``, and no refresh due."""
        self.problem.loss().backward()  # type: ignore[no-untyped-call]

    def step_alone(self) -> None:
        """The optimizer's step, without forward, backward or refresh."""
        self.optimizer.step()


class _Refreshing(Trainer):
    """``Sophia``: the loop is the same, the interval is two."""

    refreshes = True

    def ready_for_steps_alone(self) -> None:
        for group in self.optimizer.param_groups:
            group["update_every"] = 2**40
        super().ready_for_steps_alone()


class _Official(Trainer):
    """The call pattern of the official training script: after the step, a second forward over the batch,
    labels drawn by ``Categorical``, a second backward, ``update_hessian``.
    """

    refreshes = True

    def __init__(self, problem: Problem, optimizer: OfficialRule) -> None:
        super().__init__(problem, optimizer)
        self._rule, self._taken = optimizer, 0

    def step(self) -> None:
        super().step()
        if self._taken % 2 == 0:
            logits = self.problem.logits()
            logits = logits.reshape(-1, logits.shape[-1])
            drawn = torch.distributions.Categorical(logits=logits)
            labels = drawn.sample()  # type: ignore[no-untyped-call]
            F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            self._rule.update_hessian()
            self.optimizer.zero_grad()
        self._taken += 1


class _SecondOrder(Trainer):
    """``pytorch_optimizer.SophiaH``: it differentiates the gradient again inside ``step()``, so the backward
    before it keeps its graph, through attention that has a second derivative.
    """

    refreshes = True

    def __init__(self, problem: Problem, optimizer: Optimizer) -> None:
        super().__init__(problem, optimizer)
        self._taken = 0

    def step(self) -> None:
        if self._taken % 2:
            super().step()
        else:
            with sdpa_kernel(SDPBackend.MATH):
                self.problem.loss().backward(create_graph=True)  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._taken += 1

    def ready_for_steps_alone(self) -> None:
        if self._taken % 2 == 0:
            self.step()
        self.optimizer.update_period = 2**40  # type: ignore[attr-defined]
        super().ready_for_steps_alone()


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    make: Callable[[Problem], Trainer]
    package: str | None = None
    """Distribution that it needs beside torch."""
    requires: Callable[[], bool] = lambda: True
    """Whether this torch has it."""

    @property
    def missing(self) -> str | None:
        """Why it cannot be timed here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"not installed: pip install {self.package}"
        return None if self.requires() else f"torch {torch.__version__} does not have it"

    @property
    def version(self) -> str | None:
        """Of its package."""
        return None if self.package is None else importlib.metadata.version(self.package)


def _simple(make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[Problem], Trainer]:
    return lambda problem: Trainer(problem, make([p for p in problem.model.parameters() if p.requires_grad]))


def _sophia(**settings: object) -> Callable[[Problem], Trainer]:
    return lambda problem: _Refreshing(
        problem,
        Sophia(problem.model, lr=LR, update_every=2, **settings),  # type: ignore[arg-type]
    )


def _second_order(problem: Problem) -> Trainer:
    import pytorch_optimizer

    made = pytorch_optimizer.SophiaH(list(problem.model.parameters()), lr=LR, update_period=2)
    return _SecondOrder(problem, made)


def _lion(parameters: list[nn.Parameter]) -> Optimizer:
    import lion_pytorch

    return lion_pytorch.Lion(parameters, lr=LR)  # type: ignore[no-any-return]


def _heavyball(parameters: list[nn.Parameter]) -> Optimizer:
    import heavyball

    return heavyball.AdamW(parameters, lr=LR)  # type: ignore[no-any-return]


def _bitsandbytes(name: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(parameters, lr=LR)  # type: ignore[no-any-return]

    return make


def _muon(problem: Problem) -> Trainer:
    """Muon for matrices that are not of an embedding or the head, fused AdamW for the rest."""
    tables = {id(m.weight) for m in problem.model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in problem.model.modules() if isinstance(m, nn.Linear)]
    head = {id(m.weight) for m in linear[-1:]}
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in tables | head]
    inside = set(map(id, hidden))
    rest = torch.optim.AdamW([p for p in parameters if id(p) not in inside], lr=LR, fused=True)
    return Trainer(problem, Pair(torch.optim.Muon(hidden, lr=LR), rest))


METHODS: Mapping[str, Method] = {
    REFERENCE: Method(_simple(lambda p: torch.optim.AdamW(p, lr=LR, fused=True))),
    "adamw foreach": Method(_simple(lambda p: torch.optim.AdamW(p, lr=LR, foreach=True))),
    "sophia": Method(_sophia()),
    "sophia, fraction 1/2": Method(_sophia(fraction=0.5)),
    "sophia, bfloat16 state": Method(_sophia(state_dtype=torch.bfloat16)),
    "sophia, foreach": Method(_sophia(foreach=True)),
    "sophia, damped": Method(_sophia(rule="damped")),
    "sophia, spectral": Method(_sophia(rule="spectral")),
    "sophia, Hutchinson": Method(_sophia(estimator="hutchinson")),
    "official rule": Method(
        lambda problem: _Official(problem, OfficialRule(problem.model.parameters(), lr=LR))
    ),
    "pytorch-optimizer SophiaH": Method(_second_order, "pytorch-optimizer"),
    "lion-pytorch": Method(_simple(_lion), "lion-pytorch"),
    "heavyball AdamW": Method(_simple(_heavyball), "heavyball"),
    "torch Adafactor": Method(_simple(lambda p: torch.optim.Adafactor(p, lr=LR))),
    "torch Muon, AdamW": Method(_muon, requires=lambda: hasattr(torch.optim, "Muon")),
    "bitsandbytes AdamW": Method(_simple(_bitsandbytes("AdamW")), "bitsandbytes"),
    "bitsandbytes AdamW8bit": Method(_simple(_bitsandbytes("AdamW8bit")), "bitsandbytes"),
}
