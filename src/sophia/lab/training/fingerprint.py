"""The fingerprint of an optimizer's code: the numbers of a few steps of a fixed small problem.

The name of a run says which settings it had, and which versions of Sophia's numbers. The fingerprint says
what the code made of them on the day: it stands in the result of a run, and before a finished run is counted
as done it is made again and compared. So it also tells another torch, an edited optimizer, a version that
nobody raised. Kept are the numbers and no hash of them, since equal code differs in the last digits: in
float64, by 1e-14 on another processor or with another kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia import Sophia
from sophia.lab.config.run import Model
from sophia.lab.models import build
from sophia.lab.optimizers.contender import Contender
from sophia.lab.support.errors import LabError
from sophia.numerics import words
from sophia.step.dispatch import kernels_of

__all__ = ["TOLERANCE", "Fingerprint", "difference", "fingerprint", "kernels", "provenance_of"]

TOLERANCE = 1e-6
"""The relative difference from which on two fingerprints are of two codes."""
STEPS, ROWS = 12, 4  # two refreshes at the usual interval of ten steps
PROBLEM = Model(layers=1, width=16, heads=2, context=8, vocabulary=61)

_made: dict[tuple[str, str, str], Fingerprint | None] = {}


@dataclass(frozen=True)
class Fingerprint:
    """What a contender's code made of the small problem."""

    numbers: tuple[float, ...]
    """Losses of some of the steps, and how far the matrices went."""
    kernels: str
    """As `kernels` names them."""


def fingerprint(row: Contender, device: str = "cpu") -> Fingerprint | None:
    """That of a contender with its default settings; made once a process.

    None for one that cannot train this problem in float64. Random generators are left as they were.
    """
    key = (row.name, repr(row.defaults), device)
    if key not in _made:
        with torch.random.fork_rng(devices=[] if device == "cpu" else None):
            torch.manual_seed(0)
            try:
                _made[key] = _steps(row, torch.device(device))
            except (LabError, RuntimeError, TypeError, ValueError):  # no float64, or it expects other shapes
                _made[key] = None
    return _made[key]


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of two fingerprints; infinite if they are of two kinds."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / max(abs(a), abs(b), 1e-300) for a, b in zip(one, other, strict=True))


def kernels(optimizer: torch.optim.Optimizer) -> str:
    """The paths that the step of a Sophia takes, or of the one inside of another optimizer; else nothing.

    They round differently, so the ends of two runs on two paths differ in the last digits and what grows of
    them.
    """
    inner = getattr(optimizer, "averages", optimizer)
    return ", ".join(kernels_of(inner.param_groups, inner.state)) if isinstance(inner, Sophia) else ""


def provenance_of(row: Contender, optimizer: torch.optim.Optimizer, device: str) -> dict[str, Any]:
    """What the result of a run keeps about the code of its optimizer; nothing where there is nothing to say.

    ``numerics`` are the versions of all its numbers, the first ones too.
    """
    made = fingerprint(row, device)
    found = {
        "numerics": words(row.numerics, ones=True),
        "kernels": kernels(optimizer),
        "fingerprint": list(made.numbers) if made is not None else None,
    }
    return {key: value for key, value in found.items() if value}


def _steps(row: Contender, device: torch.device) -> Fingerprint:
    model: Any = build.build(PROBLEM, seed=1).to(device, torch.float64)
    model.loss_function = _loss  # that of transformers goes through float32
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # uniform numbers are the same on every processor, normal ones are not
        for p in model.parameters():
            p.add_(torch.rand(p.shape, generator=draw, dtype=torch.float64).sub_(0.5).mul_(0.2).sub_(p).to(p))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = row.build(model, row.settings({}), 1)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(PROBLEM.vocabulary, (ROWS, PROBLEM.context), generator=draw).to(device)
        again = functools.partial(_gradients, model, optimizer, ids)
        loss = again()
        if row.closure:
            optimizer.step(again)  # type: ignore[arg-type]
        else:
            optimizer.step()
        if step % 3 == 2:
            losses.append(float(loss))
    # Not the vectors: gradients of the biases of keys are rounding, and a sign of it is chance.
    way = sum(
        float((p.detach() - before).abs().sum())
        for p, before in zip(model.parameters(), start, strict=True)
        if p.ndim > 1
    )
    return Fingerprint((*losses, way), kernels(optimizer))


def _loss(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _gradients(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    with torch.enable_grad():
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
