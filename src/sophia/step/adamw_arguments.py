"""Arguments written for AdamW that mean something else here: by position, and its betas and eps by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["adamws_betas_and_eps", "taken_by_position"]

_ORDER = ("betas", "eps", "weight_decay", "amsgrad")


def taken_by_position(lr: Any, values: Sequence[Any]) -> str:
    """What to say of values given by position after lr.

    >>> taken_by_position(1e-3, [(0.9, 0.95), 1e-8, 0.1])  # doctest: +ELLIPSIS
    "Sophia takes the model and lr by position and the rest by name, but got (0.9, 0.95), 1e-08, 0.1 ..."
    """
    given = ", ".join(map(repr, values))
    names = ", ".join(_ORDER[: len(values)])
    decay = repr(values[2]) if len(values) > 2 and _is_number(values[2]) else "..."
    rate = "..." if isinstance(lr, Tensor) else repr(lr)
    return (
        f"Sophia takes the model and lr by position and the rest by name, but got {given} after lr. "
        f"In AdamW's order these are {names}; Sophia's betas are the decay of m a step and of h a refresh, "
        "and its eps is the floor of gamma h, so AdamW's values do not fit. If lr is AdamW's too, write "
        f"Sophia.from_adamw({{'lr': {rate}, 'weight_decay': {decay}}}, model), which takes half of it for "
        "the published rule; else name what you mean"
    )


def adamws_betas_and_eps(named: Mapping[str, Any]) -> str | None:
    """What to say if the settings that the user gave by name are AdamW's, None if they are not.

    They are if gamma, which AdamW does not have, is not among them, and either beta1 = 0.9 stands beside
    AdamW's own eps of 1e-8 (whatever beta2), or betas is AdamW's default (0.9, 0.999). Who names gamma has
    Sophia's settings in mind, and eps = 1e-8 alone or other betas alone are worth a try here too.

    Args:
        named: settings by name; None where nothing was given.

    >>> adamws_betas_and_eps({"betas": (0.96, 0.99), "eps": 1e-8}) is None
    True
    """
    betas, eps = named.get("betas"), named.get("eps")
    if named.get("gamma") is not None or not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    if not all(map(_is_number, betas)):
        return None
    beta1, beta2 = map(float, betas)
    eps_too = eps is not None and _is_number(eps) and math.isclose(eps, 1e-8)
    if beta1 != 0.9 or beta2 >= 1 or not (eps_too or beta2 == 0.999):
        return None
    what = f"betas=({beta1:g}, {beta2:g})" + (f" and eps={eps:g} read" if eps_too else " reads")
    of_eps = ", and eps is the floor of gamma h, not of the root of a second moment" if eps_too else ""
    return (
        f"{what} like AdamW's, but here betas are the decay of m a step and of h a refresh (so h keeps "
        f"{1 / (1 - beta2):.0f} refreshes, not steps){of_eps}: leave them out for this rule's own values, "
        "or name gamma too to mean them"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
