"""Rules on shards: what a rule must know of the whole tensor, and how it is found.

The published rule is element-wise and needs nothing. The damped one needs one number of the whole tensor, the
spectral one all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from sophia.distributed.shards import is_dtensor, local, sums_over_shards
from sophia.step.groups import coming_step
from sophia.step.rules import RULES
from sophia.step.state import RMS
from sophia.update_rule import average_gradient, look_ahead, rms, started

__all__ = ["check_whole", "local_parts", "rms_of_whole_tensors"]


def check_whole(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether this is a shard of a tensor that the group's rule must know something of.

    Raises:
        RuntimeError: the rule cannot work on it.
    """
    rule = RULES[group["rule"]]
    if not (rule.keeps_rms or rule.needs_whole):
        return False
    sharded = is_dtensor(parameter)
    if getattr(parameter, "_fsdp_flattened", False):
        shape = tuple(parameter.shape)
        raise RuntimeError(
            f"rule={rule.name!r} needs to know whole tensors, and FSDP1 has flattened this parameter (shape "
            f"here {shape}). Use fully_shard (FSDP2) with rule='damped', or rule='paper', which is "
            "element-wise"
        )
    if sharded and (rule.needs_whole or group["differentiable"]):
        what = "takes the singular values of whole matrices" if rule.needs_whole else "is not differentiable"
        raise RuntimeError(
            f"rule={rule.name!r} {what}, and this parameter of shape {tuple(parameter.shape)} is sharded. "
            "Use rule='damped' or rule='paper', or DDP"
        )
    return sharded


def rms_of_whole_tensors(
    groups: Iterable[Mapping[str, Any]],
    state_of: Callable[[Tensor, Mapping[str, Any]], Mapping[str, Tensor]],
    *,
    first: bool,
) -> None:
    """Where parameters are shards and their rule keeps an rms of the momentum, make it that of whole tensors.

    A collective of one number a tensor: after a step, whose kernels saw this process's part alone, and before
    the first one, which has no step before it.

    Args:
        groups: of the optimizer's ``param_groups``.
        state_of: from a parameter and its group to its state.
        first: only groups that are about to take their first step, whose rms is taken from the gradients.
    """
    sharded: list[tuple[Tensor, Tensor]] = []
    for group in groups:
        if not RULES[group["rule"]].keeps_rms or (first and coming_step(group) != 1):
            continue
        for parameter in group["params"]:
            if parameter.grad is None or not is_dtensor(parameter):
                continue
            state = state_of(parameter, group)
            sharded.append((parameter, state[RMS]))
            if first:
                _, g, m = local_parts(parameter, parameter.grad, state["exp_avg"])
                beta1 = float(group["betas"][0])
                g, m = ((-g if group["maximize"] else g).to(state[RMS].dtype), m.to(state[RMS].dtype))
                u = look_ahead(average_gradient(m, g, beta1=beta1), g, beta1=beta1)
                state[RMS].copy_(rms(u) / started(beta1, step=1))
    if sharded:
        # Mean squares weigh by the elements of each part; a part may be empty.
        squares = [size.square() * local(p).numel() for p, size in sharded]
        sums = sums_over_shards(squares, [p for p, _ in sharded])
        for (p, size), total in zip(sharded, sums, strict=True):
            size.copy_((total / p.numel()).sqrt())


def local_parts(parameter: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """The parts that this process holds, in the layout of the parameter."""
    whole: Any = parameter
    if is_dtensor(gradient) and gradient.placements != whole.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(whole.device_mesh, whole.placements)  # type: ignore[attr-defined]
    return tuple(map(local, (parameter, gradient, *state)))
