"""What a step does to a parameter group: lists of tensors, one call of a kernel for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sophia.distributed.shards import is_dtensor, local, sums_over_shards
from sophia.step.kernels import choose
from sophia.step.state import SIZE
from sophia.update_rule import average_gradient, corrected_gamma, look_ahead, rms, started

__all__ = ["Work", "current_gamma", "sizes_of_whole_tensors", "work_of"]

Work = tuple[ModuleType, tuple[Sequence[Tensor], ...], dict[str, Any], bool]
"""A kernel, the four columns of tensors and the settings of its call, and whether under a graph."""


def work_of(
    group: Mapping[str, Any],
    state_of: Callable[[Tensor, Mapping[str, Any]], Mapping[str, Tensor]],
    *,
    compiling: bool,
    keys: Mapping[int, int],
    stochastic: bool,
) -> Iterator[Work]:
    """The parameters of a group that have a gradient, by kernel, device and dtypes.

    Args:
        group: of the optimizer's ``param_groups``.
        state_of: from a parameter and its group to its state, made when it is first asked for.
        compiling: whether ``torch.compile`` traces the step.
        keys: by id of a parameter, the key of its noise; empty where nothing is rounded stochastically.
        stochastic: round half-precision parameters stochastically too, not only state.
    """
    settings = {
        "lr": _lr_for_the_kernel(group, compiling and group["rule"] == "paper" and not keys),
        "beta1": float(group["betas"][0]),
        "gamma": current_gamma(group),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": group["maximize"],
    }
    if group["rule"] != "paper":
        settings |= {name: group[name] for name in ("rule", "damping", "scale")}
        settings["started"] = started(group["betas"][0], step=_coming(group))
    lists: dict[tuple[Any, ...], tuple[list[tuple[Tensor, ...]], list[int], list[Tensor]]] = {}
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        state = state_of(parameter, group)
        row: tuple[Tensor, ...] = (parameter, gradient, state["exp_avg"], state["hessian"])
        if is_dtensor(parameter) and not group["differentiable"]:
            row = _shards(*row)
        size = state.get(SIZE) if group["rule"] != "paper" else None
        kernel = choose(group, settings["lr"], row)
        kind = (kernel, row[0].device, row[0].dtype, row[2].dtype, size is None)
        if kind not in lists:
            lists[kind] = ([], [], [])
        rows, of_rows, sizes = lists[kind]
        rows.append(row)
        if keys:
            of_rows.append(keys[id(parameter)])
        if size is not None:
            sizes.append(size)
    for (kernel, *_), (rows, of_rows, sizes) in lists.items():
        more: dict[str, Any] = {"keys": of_rows, "stochastic": stochastic} if of_rows else {}
        more |= {"sizes": sizes} if sizes else {}
        columns = tuple(zip(*rows, strict=True))
        yield kernel, columns, {**settings, **more}, bool(group["differentiable"])


def sizes_of_whole_tensors(
    groups: Iterable[Mapping[str, Any]],
    state_of: Callable[[Tensor, Mapping[str, Any]], Mapping[str, Tensor]],
    *,
    first: bool,
) -> None:
    """Where parameters are shards under the damped rule, make their sizes those of the whole tensors.

    A collective of one number a tensor: after a step, whose kernels saw this process's part alone, and before
    the first one, which has no step before it.

    Args:
        groups: of the optimizer's ``param_groups``.
        state_of: as in ``work_of``.
        first: only groups that are about to take their first step, whose sizes are taken from the gradients.
    """
    sharded: list[tuple[Tensor, Tensor]] = []
    for group in groups:
        if group["rule"] != "damped" or (first and _coming(group) != 1):
            continue
        for parameter in group["params"]:
            if parameter.grad is None or not is_dtensor(parameter):
                continue
            state = state_of(parameter, group)
            sharded.append((parameter, state[SIZE]))
            if first:
                _, g, m = _shards(parameter, parameter.grad, state["exp_avg"])
                beta1 = float(group["betas"][0])
                g, m = ((-g if group["maximize"] else g).to(state[SIZE].dtype), m.to(state[SIZE].dtype))
                u = look_ahead(average_gradient(m, g, beta1=beta1), g, beta1=beta1)
                state[SIZE].copy_(rms(u) / started(beta1, step=1))
    if sharded:
        squares = [size.square() * local(p).numel() for p, size in sharded]
        sums = sums_over_shards(squares, [p for p, _ in sharded])
        for (p, size), total in zip(sharded, sums, strict=True):
            size.copy_((total / p.numel()).sqrt())


def current_gamma(group: Mapping[str, Any]) -> float:
    """The group's gamma, with the corrections of its rule in it; for the step that is about to be taken."""
    gamma = float(group["gamma"])
    if group["rule"] == "paper":
        return gamma
    return corrected_gamma(gamma, betas=group["betas"], step=_coming(group), refreshes=group["refreshes"])


def _coming(group: Mapping[str, Any]) -> int:
    """The number of the step that is about to be taken, from 1 since the group joined."""
    return int(group["step"] - group["joined"]) + 1


def _shards(parameter: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """The local parts, in one layout: the rule is element-wise, and on DTensors each operation would cost
    more than the arithmetic.
    """
    whole: Any = parameter
    if is_dtensor(gradient) and gradient.placements != whole.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(whole.device_mesh, whole.placements)  # type: ignore[attr-defined]
    return tuple(map(local, (parameter, gradient, *state)))


def _lr_for_the_kernel(group: Mapping[str, Any], compiling: bool) -> float | Tensor:
    """A tensor where a number would be baked into a graph, else a number, which is faster."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        stays = compiling or group["capturable"] or group["differentiable"] or lr.requires_grad
        return lr.reshape(()) if stays else lr.item()
    return torch.tensor(lr, dtype=torch.float64) if compiling and not group["differentiable"] else lr
