"""The table of contenders: a row is a name, how to build it, its settings, its search space, and what a step
costs.

Every contender decays matrices alone, sees the same batches and starts from the same weights. ``gradients``
is the extra cost of a step in gradient evaluations (a forward and a backward of the whole batch), as a
function of the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sophia.lab.config import Setting
from sophia.lab.errors import LabError, UsageError
from sophia.lab.rivals import Lion, Pair, Signum

__all__ = ["CONTENDERS", "Choice", "Contender", "LogRange", "Settings", "find", "state_bytes"]

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class LogRange:
    """Every number from low to high, the logarithm uniform."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Setting, ...]


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    name: str
    title: str
    """For people: what it is and where it comes from."""
    build: Callable[[nn.Module, Settings, int], Optimizer]
    """(model, settings, seed) -> optimizer. ``settings["lr"]`` is the peak learning rate."""
    defaults: Settings
    """Every setting, by name; presets put their own values over these."""
    space: Mapping[str, LogRange | Choice]
    """What a search may vary."""
    state_per_parameter: int
    """Bytes of optimizer state for a trained number that belongs to a matrix."""
    gradients: Callable[[Settings], float] = lambda settings: 0.0
    """Extra gradient evaluations of a step, on average."""

    def settings(self, over: Settings) -> dict[str, Setting]:
        """The defaults with other values put over them. Raises ``UsageError`` for a name or type that is none
        of them.
        """
        merged = dict(self.defaults)
        for name, value in over.items():
            if name not in merged:
                raise UsageError(
                    f"{self.name} has no setting {name!r}, and it must not be ignored silently. "
                    f"Its settings are {', '.join(merged)}."
                )
            if isinstance(merged[name], float) and type(value) is int:
                value = float(value)
            if type(value) is not type(merged[name]):
                raise UsageError(f"{self.name}: {name} is {value!r}. Write a {type(merged[name]).__name__}.")
            merged[name] = value
        return merged


def find(name: str) -> Contender:
    """The row of that name. Raises ``UsageError`` that lists the names."""
    if name not in CONTENDERS:
        raise UsageError(f"There is no contender {name!r}. Choose from: {', '.join(CONTENDERS)}.")
    return CONTENDERS[name]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors an optimizer keeps between steps, measured."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _groups(
    model: nn.Module, settings: Settings, *, only: Callable[[str], bool] = lambda name: True
) -> list[dict[str, Any]]:
    """Matrices with decay, the rest (biases, gains) without, in the order of the model."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and only(name)]
    matrices = [p for _, p in named if p.ndim >= 2]
    rest = [p for _, p in named if p.ndim < 2]
    decay = settings["weight_decay"]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(model: nn.Module, s: Settings, seed: int, **only: Any) -> Optimizer:
    betas = (float(s["beta1"]), float(s["beta2"]))

    return torch.optim.AdamW(
        _groups(model, s, **only), lr=float(s["lr"]), betas=betas, eps=float(s["eps"]), fused=True
    )


def _sophia(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    from sophia import Sophia

    return Sophia(  # given the model, it decays matrices alone and renews its curvature by itself
        model,
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        gamma=float(s["gamma"]),
        eps=float(s["eps"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        fraction=float(s["fraction"]),
        estimator=str(s["estimator"]),
        seed=seed,
    )


def _lion(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    return Lion(_groups(model, s), lr=float(s["lr"]), betas=(float(s["beta1"]), float(s["beta2"])))


def _signum(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    return Signum(_groups(model, s), lr=float(s["lr"]), beta=float(s["beta"]))


def _muon(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise LabError(
            f"torch {torch.__version__} has no Muon, so this contender cannot run. Install torch 2.9 or "
            f"later."
        )
    shapes = {name: p.ndim for name, p in model.named_parameters()}

    def hidden(name: str) -> bool:  # matrices of the blocks; embeddings, head, norms and biases go to AdamW
        return shapes[name] == 2 and ".h." in name

    matrices = [p for name, p in model.named_parameters() if hidden(name)]
    muon = torch.optim.Muon(
        matrices,
        lr=float(s["lr"]),
        momentum=float(s["momentum"]),
        weight_decay=float(s["weight_decay"]),
        adjust_lr_fn="match_rms_adamw",  # learning rates in the units of AdamW
    )
    return Pair(muon, _adamw(model, {**s, "lr": s["adamw_lr"]}, seed, only=lambda name: not hidden(name)))


def _sampled_cost(s: Settings) -> float:
    """Gauss-Newton-Bartlett: every k-th step one more forward and backward, of a fraction of the rows."""
    return float(s["fraction"]) / float(s["update_every"])


def _hvp_cost(s: Settings) -> float:
    """Hutchinson: every k-th step a Hessian-vector product by double backward, of a fraction of the rows.

    With a forward counted 1 and a backward 2, it takes a forward (1), a backward that keeps its graph (2) and
    a backward through both (3 to 4): about two gradients. An estimate; the seconds are measured.
    """
    return 2.0 * float(s["fraction"]) / float(s["update_every"])


_RATES = LogRange(1e-4, 1e-1)
_DECAY = Choice((0.0, 0.03, 0.1, 0.2))

# Defaults are those of the papers at their own scale; presets tune them.
_SOPHIA: Settings = {
    "lr": 6e-4,
    "beta1": 0.96,
    "beta2": 0.99,
    "gamma": 0.05,
    "eps": 1e-12,
    "weight_decay": 0.1,
    "update_every": 10,
    "fraction": 0.5,
}
_SOPHIA_SPACE: Mapping[str, LogRange | Choice] = {
    "lr": LogRange(1e-4, 1e-2),
    "beta1": Choice((0.6, 0.7, 0.8, 0.9, 0.96)),
    "beta2": Choice((0.8, 0.9, 0.95, 0.99)),
    "gamma": LogRange(1e-3, 1.0),
    "weight_decay": _DECAY,
}

CONTENDERS: Mapping[str, Contender] = {
    row.name: row
    for row in (
        Contender(
            name="adamw",
            title="AdamW (torch, fused)",
            build=_adamw,
            defaults={"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
            space={
                "lr": LogRange(3e-4, 3e-2),
                "beta1": Choice((0.8, 0.9, 0.95)),
                "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
                "weight_decay": _DECAY,
            },
            state_per_parameter=8,
        ),
        Contender(
            name="sophia-g",
            title="Sophia, Gauss-Newton-Bartlett (arXiv 2305.14342)",
            build=_sophia,
            defaults={**_SOPHIA, "estimator": "gnb"},
            space=_SOPHIA_SPACE,
            state_per_parameter=8,
            gradients=_sampled_cost,
        ),
        Contender(
            name="sophia-h",
            title="Sophia, Hutchinson (arXiv 2305.14342)",
            build=_sophia,
            defaults={**_SOPHIA, "gamma": 0.01, "estimator": "hutchinson"},
            space=_SOPHIA_SPACE,
            state_per_parameter=8,
            gradients=_hvp_cost,
        ),
        Contender(
            name="lion",
            title="Lion (arXiv 2302.06675)",
            build=_lion,
            defaults={"lr": 3e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3},
            space={
                "lr": LogRange(5e-5, 5e-3),
                "beta1": Choice((0.8, 0.9, 0.95)),
                "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
                "weight_decay": Choice((0.0, 0.1, 0.3, 1.0)),
            },
            state_per_parameter=4,
        ),
        Contender(
            name="signum",
            title="sign momentum (arXiv 1802.04434)",
            build=_signum,
            defaults={"lr": 3e-4, "beta": 0.9, "weight_decay": 0.3},
            space={
                "lr": LogRange(5e-5, 5e-3),
                "beta": Choice((0.6, 0.8, 0.9, 0.95)),
                "weight_decay": Choice((0.0, 0.1, 0.3, 1.0)),
            },
            state_per_parameter=4,
        ),
        Contender(
            name="muon",
            title="Muon (torch) for hidden matrices, AdamW for the rest",
            build=_muon,
            defaults={
                "lr": 2e-3,
                "momentum": 0.95,
                "adamw_lr": 2e-3,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
            },
            space={"lr": _RATES, "adamw_lr": LogRange(3e-4, 3e-2), "momentum": Choice((0.8, 0.9, 0.95))},
            state_per_parameter=4,
        ),
    )
}
