"""The table of contenders: a row is a name, how to build it, its settings, its search space, and what a step
costs.

Every contender decays matrices alone, sees the same batches and starts from the same weights. ``gradients``
is the extra cost of a step in gradient evaluations (a forward and a backward of the whole batch), as a
function of the settings.
"""

from __future__ import annotations

from collections.abc import Mapping

from sophia.lab.config import run
from sophia.lab.config.search_space import WARMUP, Choice, LogRange, Space
from sophia.lab.optimizers import build, third_party
from sophia.lab.optimizers.contender import Contender, Settings
from sophia.lab.support.errors import UsageError

__all__ = ["CONTENDERS", "find", "of"]


def find(name: str, path: str | None = None) -> Contender:
    """The row of that name, or the contender that an installed package offers under it; with ``path``
    (``module:Class``) the one made from that class. Raises ``UsageError`` that lists the names.
    """
    if path is not None:
        if name in CONTENDERS:
            raise UsageError(
                f"{name}={path}: {name} is a row of the table of contenders, and one name cannot mean two "
                f"optimizers. Write another name, for instance my-{name}={path}."
            )
        return third_party.contender(name, path)
    if name in CONTENDERS:
        return CONTENDERS[name]
    offered = third_party.offered()
    if name in offered:
        return third_party.contender(name, offered[name])
    raise UsageError(
        f"There is no contender {name!r}. Choose from: {', '.join([*CONTENDERS, *offered])}; or give one of "
        "your own as module:Class."
    )


def of(optimizer: run.Optimizer) -> Contender:
    """The contender of a run. Raises ``LabError`` if its class is not the one the run was planned with."""
    path = optimizer.settings.get(third_party.CLASS)
    if path is None:
        return find(optimizer.contender)
    return third_party.contender(
        optimizer.contender, str(path), code=str(optimizer.settings[third_party.CODE])
    )


def _sampled_cost(s: Settings) -> float:
    """Gauss-Newton-Bartlett: every k-th step one more forward and backward, of a fraction of the rows."""
    return float(s["fraction"]) / float(s["update_every"])


def _hvp_cost(s: Settings) -> float:
    """Hutchinson: every k-th step a Hessian-vector product by double backward, of a fraction of the rows.

    For each product of matrices in the forward there are two in a backward, and six more when that is
    differentiated: nine, against the three of a gradient. The operations that torch counts say exactly that
    (`sophia experiment overhead`).
    """
    return 3.0 * float(s["fraction"]) / float(s["update_every"])


def _ablated_cost(s: Settings) -> float:
    """That of the estimator; a pre-conditioner of ones needs no pass."""
    if s["preconditioner"] == "none":
        return 0.0
    sampled = s["preconditioner"] in ("gnb", "empirical_fisher")
    return _sampled_cost(s) if sampled else _hvp_cost(s)


_DECAY = Choice((0.0, 0.03, 0.1, 0.2))
_WARMUP = Choice((0.05, 0.1, 0.2))

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
_SOPHIA_SPACE: Space = {
    "lr": LogRange(1e-4, 1e-2),
    "beta1": Choice((0.6, 0.7, 0.8, 0.9, 0.96)),
    "beta2": Choice((0.8, 0.9, 0.95, 0.99)),
    "gamma": LogRange(1e-3, 1.0),
    "eps": Choice((1e-12, 1e-8, 1e-7)),
    "weight_decay": _DECAY,
    WARMUP: _WARMUP,
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
    "weight_decay": _DECAY,
    WARMUP: _WARMUP,
}
_ADAM_SPACE: Space = {
    "lr": LogRange(3e-4, 3e-2),
    "beta1": Choice((0.7, 0.8, 0.9, 0.95)),
    "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
    "weight_decay": _DECAY,
    WARMUP: _WARMUP,
}
_SIGN_DECAY = Choice((0.0, 0.1, 0.3, 1.0))

CONTENDERS: Mapping[str, Contender] = {
    row.name: row
    for row in (
        Contender(
            name="adamw",
            title="AdamW (torch, fused)",
            build=build.adamw,
            defaults={"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
            space=_ADAM_SPACE,
            state_per_parameter=8,
        ),
        Contender(
            name="sophia-g",
            title="Sophia, Gauss-Newton-Bartlett (arXiv 2305.14342)",
            build=build.sophia,
            defaults={**_SOPHIA, "estimator": "gnb"},
            space=_SOPHIA_SPACE,
            state_per_parameter=8,
            gradients=_sampled_cost,
        ),
        Contender(
            name="sophia-damped",
            title="Sophia, the damped rule (ours), Gauss-Newton-Bartlett",
            build=build.own_rule,
            defaults={"lr": 3e-3, **_OWN, "rule": "damped"},
            space={"lr": LogRange(5e-4, 1.25e-2), **_OWN_SPACE},
            state_per_parameter=8,
            gradients=_sampled_cost,
        ),
        Contender(
            name="sophia-spectral",
            title="Sophia, the spectral rule (ours), Gauss-Newton-Bartlett",
            build=build.own_rule,
            defaults={"lr": 8e-3, **_OWN, "rule": "spectral"},
            space={"lr": LogRange(2e-3, 5e-2), **_OWN_SPACE},
            state_per_parameter=8,
            gradients=_sampled_cost,
        ),
        Contender(
            name="sophia-h",
            title="Sophia, Hutchinson (arXiv 2305.14342)",
            build=build.sophia,
            defaults={**_SOPHIA, "gamma": 0.01, "estimator": "hutchinson"},
            space=_SOPHIA_SPACE,
            state_per_parameter=8,
            gradients=_hvp_cost,
        ),
        Contender(
            name="sophia-ef",
            title="Sophia with the empirical Fisher: the training labels in place of sampled ones",
            build=build.sophia,
            defaults={**_SOPHIA, "estimator": "empirical_fisher"},
            space=_SOPHIA_SPACE,
            state_per_parameter=8,
            gradients=_sampled_cost,
        ),
        Contender(
            name="adahessian",
            title="AdaHessian's step (arXiv 2006.00719): the root of averaged squares, no clip",
            build=build.adahessian,
            defaults={
                "lr": 1e-3,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "update_every": 10,
                "fraction": 0.5,
            },
            space={**_ADAM_SPACE, "update_every": Choice((1, 5, 10))},
            state_per_parameter=8,
            gradients=_hvp_cost,
        ),
        Contender(
            name="ablated",
            title="Sophia with another pre-conditioner or another bound of the step, for ablations",
            build=build.ablated,
            defaults={**_SOPHIA, "preconditioner": "gnb", "bound": "clip"},
            space=_SOPHIA_SPACE,
            state_per_parameter=8,
            gradients=_ablated_cost,
        ),
        Contender(
            name="adamw-apart",
            title="AdamW with a learning rate of its own for hidden matrices (torch, fused)",
            build=build.adamw_apart,
            defaults={
                "lr": 4e-3,
                "matrix_lr": 1e-3,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
            },
            space={**_ADAM_SPACE, "matrix_lr": LogRange(3e-4, 1e-2)},
            state_per_parameter=8,
        ),
        Contender(
            name="nadamw",
            title="NAdam with decoupled decay (torch)",
            build=build.nadamw,
            defaults={
                "lr": 1e-3,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "momentum_decay": 4e-3,
                "weight_decay": 0.1,
            },
            space=_ADAM_SPACE,
            state_per_parameter=8,
        ),
        Contender(
            name="adafactor",
            title="Adafactor (torch; arXiv 1804.04235): its lr is relative to the size of each tensor",
            build=build.adafactor,
            defaults={"lr": 1e-2, "beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.1},
            space={
                "lr": LogRange(3e-3, 3e-1),
                "beta2_decay": Choice((-1.0, -0.8, -0.5)),
                "weight_decay": _DECAY,
                WARMUP: _WARMUP,
            },
            state_per_parameter=0,
        ),
        Contender(
            name="sgd",
            title="gradient descent with momentum (torch); its decay is part of the gradient",
            build=build.sgd,
            defaults={"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4},
            space={
                "lr": LogRange(0.01, 3.0),
                "momentum": Choice((0.8, 0.9, 0.95)),
                "weight_decay": Choice((0.0, 1e-5, 1e-4, 1e-3)),
                WARMUP: _WARMUP,
            },
            state_per_parameter=4,
        ),
        Contender(
            name="lion",
            title="Lion (arXiv 2302.06675)",
            build=build.lion,
            defaults={"lr": 3e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3},
            space={
                "lr": LogRange(5e-5, 5e-3),
                "beta1": Choice((0.8, 0.9, 0.95)),
                "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
                "weight_decay": _SIGN_DECAY,
                WARMUP: _WARMUP,
            },
            state_per_parameter=4,
        ),
        Contender(
            name="signum",
            title="sign momentum (arXiv 1802.04434)",
            build=build.signum,
            defaults={"lr": 3e-4, "beta": 0.9, "weight_decay": 0.3},
            space={
                "lr": LogRange(5e-5, 5e-3),
                "beta": Choice((0.6, 0.8, 0.9, 0.95)),
                "weight_decay": _SIGN_DECAY,
                WARMUP: _WARMUP,
            },
            state_per_parameter=4,
        ),
        Contender(
            name="muon",
            title="Muon (torch) for hidden matrices, AdamW for the rest",
            build=build.muon,
            defaults={
                "lr": 2e-3,
                "momentum": 0.95,
                "adamw_lr": 2e-3,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
            },
            space={
                "lr": LogRange(3e-4, 3e-2),
                "adamw_lr": LogRange(3e-4, 3e-2),
                "momentum": Choice((0.8, 0.9, 0.95)),
                "beta1": Choice((0.7, 0.8, 0.9)),
                "weight_decay": _DECAY,
                WARMUP: _WARMUP,
            },
            state_per_parameter=4,
        ),
    )
}
