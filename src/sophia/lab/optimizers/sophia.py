"""Sophia: the published rule with each estimator, and rules of our own."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from sophia import Sophia
from sophia.lab.config.search_space import WARMUP, Choice, LogRange, Space
from sophia.lab.optimizers.contender import DECAYS, WARMUPS, Contender, Settings

__all__ = [
    "CONTENDERS",
    "DEFAULTS",
    "SPACE",
    "build",
    "build_damped",
    "build_without_curvature",
    "hessian_vector_cost",
    "sampled_cost",
]


def build(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """The published rule, with the estimator that the settings name."""
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


def build_damped(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """The damped rule, with the Gauss-Newton-Bartlett estimator."""
    return Sophia(
        model,
        rule=str(s["rule"]),
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        gamma=float(s["gamma"]),
        damping=float(s["damping"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        fraction=float(s["fraction"]),
        seed=seed,
    )


def build_without_curvature(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """The spectral or the whitened rule; embeddings, head and vectors have decays of their own."""
    optimizer = Sophia(
        model,
        rule=str(s["rule"]),
        lr=float(s["lr"]),
        eps=float(s["eps"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        seed=seed,
    )
    for group in optimizer.param_groups:
        names = ("beta1", "beta2") if group["rule"] == s["rule"] else ("rest_beta1", "rest_beta2")
        group["betas"] = (float(s[names[0]]), float(s[names[1]]))
    return optimizer


def sampled_cost(s: Settings) -> float:
    """Gauss-Newton-Bartlett: every k-th step one more forward and backward, of a fraction of the rows."""
    return float(s["fraction"]) / float(s["update_every"])


def hessian_vector_cost(s: Settings) -> float:
    """Hutchinson: every k-th step a Hessian-vector product by double backward, of a fraction of the rows.

    For each product of matrices in the forward there are two in a backward, and six more when that is
    differentiated: nine, against the three of a gradient. The operations that torch counts say exactly that
    (`sophia experiment overhead`).
    """
    return 3.0 * float(s["fraction"]) / float(s["update_every"])


# The paper's, at its own scale; presets tune them. Half of the batch is in the records, and stays: the
# optimizer itself takes an eighth by default.
DEFAULTS: Settings = {
    "lr": 6e-4,
    "beta1": 0.96,
    "beta2": 0.99,
    "gamma": 0.05,
    "eps": 1e-12,
    "weight_decay": 0.1,
    "update_every": 10,
    "fraction": 0.5,
}
SPACE: Space = {
    "lr": LogRange(1e-4, 1e-2),
    "beta1": Choice((0.6, 0.7, 0.8, 0.9, 0.96)),
    "beta2": Choice((0.8, 0.9, 0.95, 0.99)),
    "gamma": LogRange(1e-3, 1.0),
    "eps": Choice((1e-12, 1e-8, 1e-7)),
    "weight_decay": DECAYS,
    WARMUP: WARMUPS,
    "update_every": Choice((5, 10, 20)),
    "fraction": Choice((0.25, 0.5, 1.0)),
}
_OWN: Settings = {
    "beta1": 0.9,
    "beta2": 0.9,
    "gamma": 0.2,
    "damping": 0.5,
    "weight_decay": 0.1,
    "update_every": 10,
    "fraction": 0.125,
}
_OWN_SPACE: Space = {
    "beta1": Choice((0.8, 0.9, 0.95)),
    "gamma": LogRange(0.05, 1.0),
    "damping": Choice((0.25, 0.5, 1.0)),
    "weight_decay": DECAYS,
    WARMUP: WARMUPS,
}
_FACTORED: Settings = {
    "beta1": 0.9,
    "beta2": 0.9,
    "rest_beta1": 0.8,
    "rest_beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "update_every": 5,
}
_FACTORED_SPACE: Space = {
    "beta1": Choice((0.8, 0.9, 0.95)),
    "rest_beta1": Choice((0.7, 0.8, 0.9)),
    "rest_beta2": Choice((0.9, 0.95, 0.98)),
    "weight_decay": DECAYS,
    WARMUP: WARMUPS,
}

CONTENDERS = (
    Contender(
        name="sophia-g",
        title="Sophia, Gauss-Newton-Bartlett, on the paper's half of the batch (arXiv 2305.14342)",
        build=build,
        defaults={**DEFAULTS, "estimator": "gnb"},
        space=SPACE,
        state_per_parameter=8,
        gradients=sampled_cost,
        parts=("gnb", "paper"),
        line="Sophia(model)",
        line_has={"fraction": 0.125},
    ),
    Contender(
        name="sophia-damped",
        title="Sophia, the damped rule (ours), Gauss-Newton-Bartlett",
        build=build_damped,
        defaults={"lr": 3e-3, **_OWN, "rule": "damped"},
        space={"lr": LogRange(5e-4, 1.25e-2), **_OWN_SPACE},
        state_per_parameter=8,
        gradients=sampled_cost,
        parts=("gnb", "damped"),
        line='Sophia(model, rule="damped")',
        line_has={"lr": 6e-4},
    ),
    Contender(
        name="sophia-spectral",
        title="Sophia, the spectral rule (ours): no curvature, nothing kept of hidden matrices but momentum",
        build=build_without_curvature,
        defaults={"lr": 0.02, **_FACTORED, "rule": "spectral"},
        space={"lr": LogRange(2e-3, 5e-2), **_FACTORED_SPACE},
        state_per_parameter=4,
        parts=("spectral",),
        line='Sophia(model, rule="spectral")',
        line_has={"lr": 6e-4},
    ),
    Contender(
        name="sophia-whitened",
        title="Sophia, the whitened rule (ours): no curvature, second moments of the gradients",
        build=build_without_curvature,
        defaults={"lr": 0.02, **_FACTORED, "rule": "whitened"},
        space={"lr": LogRange(2e-3, 6e-2), **_FACTORED_SPACE},
        state_per_parameter=6,
        parts=("whitened",),
        line='Sophia(model, rule="whitened")',
        line_has={"lr": 6e-4},
    ),
    Contender(
        name="sophia-h",
        title="Sophia, Hutchinson, on half of the batch (arXiv 2305.14342)",
        build=build,
        defaults={**DEFAULTS, "gamma": 0.01, "estimator": "hutchinson"},
        space=SPACE,
        state_per_parameter=8,
        gradients=hessian_vector_cost,
        parts=("hutchinson", "paper"),
        line='Sophia(model, estimator="hutchinson")',
        line_has={"fraction": 0.125, "gamma": 0.05},
    ),
    Contender(
        name="sophia-ef",
        title="Sophia with the empirical Fisher: the training labels in place of sampled ones",
        build=build,
        defaults={**DEFAULTS, "estimator": "empirical_fisher"},
        space=SPACE,
        state_per_parameter=8,
        gradients=sampled_cost,
        parts=("empirical_fisher", "paper"),
        line='Sophia(model, estimator="empirical_fisher")',
        line_has={"fraction": 0.125},
    ),
)
