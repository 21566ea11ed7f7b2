"""Parameter groups: which parameters are decayed, and whether a group's settings can be meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sophia.checks import check_number, check_option
from sophia.distributed.wrappers import full_ndims
from sophia.step.kernels import fused_cpu

__all__ = [
    "RULES",
    "check_group",
    "decayed_and_not",
    "matrices_and_vectors",
    "translated_from_adamw",
]

RULES = ("paper", "damped", "spectral")
Named = tuple[str, nn.Parameter]


def decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of a model's trainable parameters: matrices and larger are decayed, vectors and scalars are
    not.
    """
    matrices, vectors = matrices_and_vectors(model)
    if not matrices and not vectors:
        raise ValueError(
            f"Sophia(model): {type(model).__name__} has no parameter with requires_grad=True, so there is "
            "nothing to train"
        )
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def matrices_and_vectors(model: nn.Module) -> tuple[list[Named], list[Named]]:
    """A model's trainable parameters with their names: those of two dimensions or more, and the rest."""
    whole = full_ndims(model)  # a wrapper may show a flat part of a matrix
    parts: tuple[list[Named], list[Named]] = ([], [])
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts[whole.get(id(p), p.ndim) < 2].append((name, p))
    return parts


def check_group(group: Mapping[str, Any], *, rounds: bool = False) -> None:
    """Raise ValueError or RuntimeError for the first setting of a parameter group that cannot be meant.

    ``rounds``: whether state or parameters are rounded stochastically.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(
            # torch's words, for code that looks for them
            f"Tensor lr must be 1-element, but this one has {lr.numel()}: the rate of a group is one number"
        )
    check_number("lr", lr, at_least=0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            f"betas={betas!r}: give two numbers, the decay of m and the decay of h, e.g. (0.96, 0.99)"
        )
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        check_number(name, beta, at_least=0.0, below=1.0)
    check_number("gamma", group["gamma"], above=0.0)
    # With eps = 0 a coordinate whose m and h are both zero (an unseen token's embedding) would be 0 / 0.
    check_number("eps", group["eps"], above=0.0)
    check_number("weight_decay", group["weight_decay"], at_least=0.0)
    check_option("rule", group["rule"], RULES)
    check_number("damping", group["damping"], at_least=0.0)
    check_number("scale", group["scale"], above=0.0)
    if group["rule"] == "paper" and group["scale"] != 1.0:
        raise ValueError(
            f"scale={group['scale']!r} with rule='paper': the published step is "
            "lr clip(m / max(gamma h, eps), 1). Give the group another lr, or another rule"
        )
    every = group["update_every"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(
            f"update_every={every!r}: h is renewed every so many steps, a whole number from 1; the paper "
            "has 10"
        )
    if group["fused"] and group["foreach"]:
        raise RuntimeError(
            "`fused` and `foreach` cannot be `True` together: leave both at None to let Sophia choose"
        )
    if group["fused"] and not torch.cuda.is_available() and (reason := fused_cpu.unavailable()):
        raise RuntimeError(f"fused=True: {reason}. Leave fused=None to let Sophia choose the fastest path")
    if group["differentiable"] and (group["foreach"] or group["fused"]):
        raise RuntimeError(
            "differentiable=True runs tensor by tensor: it goes with neither foreach=True nor fused=True"
        )
    if rounds and (group["differentiable"] or group["capturable"]):
        raise RuntimeError(
            "stochastic rounding (state_dtype=torch.bfloat16 or stochastic_rounding=True) goes with neither "
            "differentiable=True nor capturable=True: a rounding has no derivative, and a captured graph "
            "would repeat the noise of one step. Keep the state in torch.float32"
        )


def translated_from_adamw(source: Any, ratio: float) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Sophia's groups and defaults from an AdamW or from a mapping of its arguments.

    Returns:
        The groups with their parameters (None from a mapping), and lr and weight_decay for the rest.
    """
    check_number("lr_ratio", ratio, above=0.0)
    if isinstance(source, Mapping):
        missing = [name for name in ("lr", "weight_decay") if name not in source]
        if missing:
            raise ValueError(
                f"from_adamw got a mapping without {missing[0]!r}: the settings to translate are lr and "
                "weight_decay. Write from_adamw({'lr': 6e-4, 'weight_decay': 0.1}, model)"
            )
        return None, {"lr": source["lr"] * ratio, "weight_decay": source["weight_decay"] / ratio}
    groups = getattr(source, "param_groups", None)
    if groups is None or any("lr" not in group or "weight_decay" not in group for group in groups):
        raise ValueError(
            f"from_adamw got {type(source).__name__}: it has no parameter groups with lr and weight_decay to "
            "translate. Pass the AdamW itself, or {'lr': ..., 'weight_decay': ...}"
        )
    translated = [
        {
            "params": list(zip(group["param_names"], group["params"], strict=True))
            if "param_names" in group
            else group["params"],
            # The peak, if a scheduler has already turned it down.
            "lr": group.get("initial_lr", group["lr"]) * ratio,
            "weight_decay": group["weight_decay"] / ratio,
            "maximize": group.get("maximize", False),
        }
        for group in groups
    ]
    return translated, {"lr": translated[0]["lr"], "weight_decay": translated[0]["weight_decay"]}
