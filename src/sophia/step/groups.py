"""Parameter groups: decay, counters, checks of settings, groups from an AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sophia.checks import check_number, check_option
from sophia.distributed.wrappers import full_shapes
from sophia.step.kernels import fused_cpu
from sophia.step.rules import RULES

__all__ = [
    "COUNTERS",
    "check_group",
    "coming_step",
    "decayed_and_not",
    "is_vector",
    "matrices_and_vectors",
    "translated_from_adamw",
]

Named = tuple[str, nn.Parameter]

COUNTERS: Mapping[str, int | float] = {
    # Steps taken. In all groups alike, also in one that was added later.
    "step": 0,
    # The value of "step" when the group was added: what started at zero then is corrected from there.
    "joined": 0,
    # The value of "step" at the last refresh of h; -1 if there was none.
    "refreshed": -1,
    # Refreshes that were averaged into h.
    "refreshes": 0,
    # Passes whose estimate was thrown away, with a warning.
    "skipped": 0,
    # B, the predictions counted in the last pass; in the first group alone.
    "counted": 0.0,
    # Of the last replay, in the first group alone: its predictions over those of the step, and the scale of
    # .grad in units of the loss (``refresh/gradient_scale.py``).
    "share": 0.0,
    "gradient_scale": 0.0,
    # Whether all predictions weighed the same, so that the next refresh reads a sample of them.
    "weights_equal": 0,
}
"""The counters of the refreshes, by their first values. They live in ``param_groups``: there every format of
checkpoints carries them.
"""


def coming_step(group: Mapping[str, Any]) -> int:
    """The number of the step that is about to be taken, from 1 since the group joined."""
    return int(group["step"] - group["joined"]) + 1


def decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of all of a model's parameters: matrices and larger are decayed, vectors and scalars are
    not. Frozen ones are among them, as what is unfrozen later is to be trained.
    """
    if not any(p.requires_grad for p in model.parameters()):
        number = sum(1 for _ in model.parameters())
        raise ValueError(
            f"Sophia(model): {type(model).__name__} has no parameters, so there is nothing to train"
            if number == 0
            else f"Sophia(model): {type(model).__name__} has no parameter with requires_grad=True, all "
            f"{number} are frozen, so there is nothing to train. Unfreeze what shall be trained first; the "
            "others are held too and may be unfrozen later"
        )
    matrices, vectors = matrices_and_vectors(model)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def matrices_and_vectors(model: nn.Module) -> tuple[list[Named], list[Named]]:
    """A model's parameters with their names: those of two dimensions or more, and the rest.

    Frozen integers (quantized weights) are left out, as nothing can train them, and frozen complex ones, as
    these are refused.
    """
    whole = full_shapes(model)  # a wrapper may show a flat part of a matrix
    parts: tuple[list[Named], list[Named]] = ([], [])
    for name, p in model.named_parameters():
        if p.is_floating_point() or p.requires_grad:
            parts[is_vector(name, whole.get(id(p), p.shape))].append((name, p))
    return parts


def is_vector(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter holds one number a row, whatever its dimensions: ``(n, 1)`` and ``(1, 1)`` too,
    such as the gains of weight_norm and the length scales of gpytorch. The ``weight`` of a layer is a matrix
    in that shape as well (a linear layer of one input).

    >>> [is_vector("scale", shape) for shape in ((), (5,), (5, 1), (1, 1), (5, 1, 1), (1, 5), (5, 2))]
    [True, True, True, True, True, False, False]
    >>> is_vector("0.weight", (5, 1)), is_vector("0.weight", (5,))
    (False, True)
    """
    if len(shape) > 1 and name.rpartition(".")[2] == "weight":
        return False
    return all(size == 1 for size in shape[1:])


def check_group(group: Mapping[str, Any], *, rounds: bool = False) -> None:
    """Raise ValueError or RuntimeError for the first setting of a parameter group that is invalid.

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
    check_option("rule", group["rule"], tuple(RULES))
    rule = RULES[group["rule"]]
    check_number("damping", group["damping"], at_least=0.0)
    check_number("scale", group["scale"], above=0.0)
    if group["scale"] != 1.0 and not rule.needs_model:
        raise ValueError(
            f"scale={group['scale']!r} with rule={rule.name!r}: that rule moves all kinds of tensors "
            "by lr alone. Give the group another lr, or another rule"
        )
    kept = rule.statistics
    if kept is not None and group["damping"] > 0.1:
        raise ValueError(
            f"damping={group['damping']!r} with rule={rule.name!r}: there it is added to second moments "
            "in units of their mean, and so much would level most of them; the floor of a curvature, which "
            "is of that size, is rule='damped'. Leave it out, or give at most 0.1"
        )
    if kept is not None and kept.decomposes and (group["differentiable"] or group["capturable"]):
        raise RuntimeError(
            f"rule={rule.name!r} decomposes matrices every few steps, which goes with neither "
            "differentiable=True nor capturable=True: use rule='paper'"
        )
    if group["capturable"] and rule.has_curvature and rule.starts_corrected:
        raise RuntimeError(
            f"capturable=True with rule={rule.name!r}: it corrects m and h for their start at zero by "
            "numbers that change at every step, and a captured graph would repeat those of one. Use "
            "rule='paper', or leave capturable out"
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
