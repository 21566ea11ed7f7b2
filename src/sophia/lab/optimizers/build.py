"""How each row of the table of contenders is built from a model, its settings and a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sophia import Sophia
from sophia.lab.optimizers.ablated_sophia import Ablated
from sophia.lab.optimizers.borrowed_curvature import RootOfCurvature
from sophia.lab.optimizers.contender import Settings, decayed_and_not
from sophia.lab.optimizers.lion_signum_pair import Lion, Pair, Signum
from sophia.lab.support.errors import LabError
from sophia.step.hidden_matrices import hidden_matrices

__all__ = [
    "ablated",
    "adafactor",
    "adahessian",
    "adamw",
    "adamw_apart",
    "lion",
    "muon",
    "nadamw",
    "own_rule",
    "sgd",
    "signum",
    "sophia",
]


def adamw(model: nn.Module, s: Settings, seed: int, **only: Any) -> Optimizer:
    """AdamW, fused, of all parameters or of those whose name ``only`` takes."""
    betas = (float(s["beta1"]), float(s["beta2"]))
    return torch.optim.AdamW(
        decayed_and_not(model, s, **only), lr=float(s["lr"]), betas=betas, eps=float(s["eps"]), fused=True
    )


def sophia(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Sophia with the estimator that the settings name."""
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


def own_rule(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Sophia with one of its own rules."""
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


def adamw_apart(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """AdamW with a learning rate of its own for the hidden matrices."""
    hidden = hidden_matrices(model)
    inner = {name for name, p in model.named_parameters() if id(p) in hidden}
    return Pair(
        adamw(model, s, seed, only=lambda name: name not in inner),
        adamw(model, {**s, "lr": s["matrix_lr"]}, seed, only=lambda name: name in inner),
    )


def adahessian(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """AdaHessian's step."""
    return RootOfCurvature(
        model,
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        eps=float(s["eps"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        fraction=float(s["fraction"]),
        seed=seed,
    )


def ablated(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Sophia with the pre-conditioner and the bound that the settings name."""
    return Ablated(
        model,
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        gamma=float(s["gamma"]),
        eps=float(s["eps"]),
        weight_decay=float(s["weight_decay"]),
        update_every=int(s["update_every"]),
        fraction=float(s["fraction"]),
        preconditioner=str(s["preconditioner"]),
        bound=str(s["bound"]),
        seed=seed,
    )


def nadamw(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """NAdam with decoupled decay."""
    return torch.optim.NAdam(
        decayed_and_not(model, s),
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        eps=float(s["eps"]),
        momentum_decay=float(s["momentum_decay"]),
        decoupled_weight_decay=True,
    )


def adafactor(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Adafactor."""
    return torch.optim.Adafactor(
        decayed_and_not(model, s), lr=float(s["lr"]), beta2_decay=float(s["beta2_decay"]), d=float(s["d"])
    )


def sgd(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Gradient descent with momentum; torch adds its decay to the gradient."""
    return torch.optim.SGD(decayed_and_not(model, s), lr=float(s["lr"]), momentum=float(s["momentum"]))


def lion(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Lion."""
    return Lion(decayed_and_not(model, s), lr=float(s["lr"]), betas=(float(s["beta1"]), float(s["beta2"])))


def signum(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Sign momentum."""
    return Signum(decayed_and_not(model, s), lr=float(s["lr"]), beta=float(s["beta"]))


def muon(model: nn.Module, s: Settings, seed: int) -> Optimizer:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and vectors."""
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
    return Pair(muon, adamw(model, {**s, "lr": s["adamw_lr"]}, seed, only=lambda name: not hidden(name)))
