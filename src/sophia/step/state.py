"""State of a parameter (m, and h or the statistics that stand for it), and loading it from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.distributed.shards import laid_out_like, local
from sophia.step.rules import RULES, Rule
from sophia.update_rule import along

__all__ = ["RMS", "add_what_is_missing", "check_origin", "is_complete", "other_settings", "restore_state"]

RMS = "momentum_rms"
"""Of a tensor whose rule keeps it: one number, see ``update_rule.usual_size``."""

_OF_OTHER_RULES = (
    "hessian",
    "steps",
    "second_moment",
    "basis",
    "basis_squares",
    "mean_squares",
    "exp_avg_sq",
)
"""Left by a rule that a group had before; not loaded."""

_FOREIGN = (
    "whose second moment, if it has one, is not a curvature. Start Sophia afresh from the model's weights"
)


def add_what_is_missing(
    state: MutableMapping[str, Tensor], parameter: Tensor, rule: Rule, dtype: torch.dtype
) -> None:
    """Make the buffers of a parameter under a rule, zero: m and h in its memory layout (a DTensor's shards
    too), or in the place of h what the rule's statistics keep; the number ``RMS`` too where the rule has it.

    Float64 parameters have float64 state. Statistics have float32 at least: their eigenvalues span twice the
    orders of magnitude of the gradients.
    """
    rule = rule.moving(parameter)
    wide = parameter.dtype if parameter.dtype == torch.float64 else dtype
    for name in ("exp_avg", "hessian") if rule.has_curvature else ("exp_avg",):
        if name not in state:
            state[name] = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
    for name, shape in _kept(rule, parameter).items():
        if name not in state:
            exact = torch.promote_types(wide, torch.float32)
            # The count stays on the processor, where it is read at every step.
            device = parameter.device if name != "steps" else None
            state[name] = torch.zeros(shape, dtype=exact, device=device)
    if RMS not in state and rule.keeps_rms:
        state[RMS] = _number(parameter, dtype)


def is_complete(state: Mapping[str, Tensor], parameter: Tensor, rule: Rule) -> bool:
    """Whether all buffers are there: a group may change its rule."""
    if not state:
        return False
    by = rule.moving(parameter)
    if by.statistics is not None:
        return _kept(by, parameter).keys() <= state.keys()
    return "hessian" in state and (RMS in state or not by.keeps_rms)


def _kept(rule: Rule, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    return {} if rule.statistics is None else rule.statistics.shapes(parameter.shape)


def _number(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.float64 in (parameter.dtype, dtype)
    return torch.zeros((), dtype=torch.float64 if exact else torch.float32, device=parameter.device)


def check_origin(loaded: Mapping[str, Any]) -> None:
    """Raise ValueError unless this can be Sophia's, judged by the groups: the state itself may be empty."""
    missing = sorted({"state", "param_groups"} - set(loaded))
    if missing:
        raise ValueError(
            f"an optimizer's state has the keys 'param_groups' and 'state', but this one lacks {missing} and "
            f"has {sorted(map(str, loaded))[:5]}. If it is a whole checkpoint, pass the optimizer's part of "
            "it"
        )
    for number, group in enumerate(loaded["param_groups"]):
        if "gamma" not in group:
            other = "an Adam's" if "amsgrad" in group else "another optimizer's"
            raise ValueError(
                f"parameter group {number} has the settings {sorted(map(str, group))} but no gamma: this is "
                f"{other} state, {_FOREIGN}"
            )


_SETTINGS = ("gamma", "betas", "eps", "update_every", "rule", "damping")


def other_settings(
    now: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Settings that a state dict brings in place of others, as (now, loaded), by name; of the first group
    where they differ.

    lr is compared by the peak that a scheduler of torch has noted, and betas[0] not where it cycles: what a
    schedule or a loop writes differs on every resume, and is right.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for mine, theirs in zip(now, loaded, strict=True):
        if "rule" not in theirs:
            continue  # converted from another implementation, whose settings are wanted
        for name in _SETTINGS:
            if name in theirs and not _equal(name, mine, theirs):
                found.setdefault(name, (mine[name], theirs[name]))
        if "initial_lr" in theirs and "max_lr" not in theirs:
            peak = mine.get("initial_lr", mine["lr"])
            if not math.isclose(float(peak), float(theirs["initial_lr"]), rel_tol=1e-6):
                found.setdefault("lr", (float(peak), float(theirs["initial_lr"])))
    return found


def _equal(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    if name != "betas":
        return bool(mine[name] == theirs[name])
    first = 1 if "max_momentum" in theirs else 0
    return [float(b) for b in mine[name]][first:] == [float(b) for b in theirs[name]][first:]


def restore_state(
    state: MutableMapping[Any, Any],
    parameters: Sequence[Tensor],
    loaded: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Put m and h of a loaded state dict into ``state``, as copies, in the precision of the state.

    ``torch.optim.Optimizer.load_state_dict`` casts them to the dtype of the parameters, which would leave a
    half-precision model with a half-precision h: 1e-11 becomes zero.

    Raises:
        ValueError: the entries are not Sophia's or do not fit the parameters.
    """
    numbered = [(number, group) for group in loaded["param_groups"] for number in group["params"]]
    for (number, group), parameter in zip(numbered, parameters, strict=True):
        entries = loaded["state"].get(number)
        if not entries:
            continue
        rule = RULES[group.get("rule", "paper")]
        restored: dict[str, Tensor] = {}
        add_what_is_missing(restored, parameter, rule, dtype)
        restored.pop(RMS, None)  # it may be missing in the file: a group that changed its rule
        if "basis_squares" in restored and {"second_moment", "basis"} <= entries.keys():
            # The first version of the factored rule had no such averages, and took these in their place.
            before = along(entries["second_moment"], entries["basis"])
            entries = {"basis_squares": before, **entries}
        _check(entries, restored, number, parameter)
        for name, value in restored.items():
            if value.shape == parameter.shape:
                local(value).copy_(laid_out_like(entries[name], parameter))
            else:
                value.copy_(entries[name])
        if RMS in entries:
            restored[RMS] = _number(parameter, dtype).copy_(entries[RMS])
        state[parameter] = restored


def _check(
    entries: Mapping[str, Any], expected: Mapping[str, Tensor], number: int, parameter: Tensor
) -> None:
    if set(entries) - set(expected) - {RMS, *_OF_OTHER_RULES} or not set(expected) <= set(entries):
        raise ValueError(
            f"the state of parameter {number} has the keys {sorted(entries)}, but Sophia's are "
            f"{sorted(expected)}: this is another optimizer's state, {_FOREIGN}"
        )
    for name, like in expected.items():
        value = entries[name]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(like.shape):
            wanted = "" if like.shape == parameter.shape else f", so that it should be {tuple(like.shape)}"
            raise ValueError(
                f"{name} of parameter {number} has shape {shape}, but the parameter has "
                f"{tuple(parameter.shape)}{wanted}: load the state of the same model"
            )
