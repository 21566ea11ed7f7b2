"""Tensors of a step, grouped by kernel, device and dtype: one call of a kernel for each list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophia.distributed.shards import is_dtensor
from sophia.step.groups import coming_step
from sophia.step.kernels import choose
from sophia.step.rules import RULES, Rule, StepSettings
from sophia.step.state import RMS
from sophia.step.whole_tensors import local_parts
from sophia.update_rule import corrected_gamma, started

__all__ = ["StateOf", "Work", "current_gamma", "kernels_of", "work_of"]

StateOf = Callable[[Tensor, Mapping[str, Any]], Mapping[str, Tensor]]
"""From a parameter and its group to its state, made when it is first asked for."""


class Work(NamedTuple):
    """One call of a kernel."""

    kernel: ModuleType
    columns: tuple[Sequence[Any], ...]
    """Parameters, gradients, m, and h or, of a rule without curvature, the state itself."""
    settings: StepSettings
    sizes: list[Tensor] | None
    """``state[p]["momentum_rms"]`` where the rule keeps it."""
    keys: list[int] | None
    """Of the noise of each parameter; None where nothing is rounded stochastically."""
    differentiable: bool
    """Whether a graph is recorded through the step."""

    @property
    def stays_out_of_graphs(self) -> bool:
        """Whether a compiled graph would bake in what changes at every step: noise, the corrected gamma."""
        return self.keys is not None or self.settings.rule.starts_corrected

    def do(self) -> None:
        """Take the step."""
        self.kernel.step(*self.columns, self.settings, sizes=self.sizes, keys=self.keys)


def work_of(
    group: Mapping[str, Any], state_of: StateOf, *, compiling: bool, keys: Mapping[int, int], stochastic: bool
) -> Iterator[Work]:
    """The parameters of a group that have a gradient, by kernel, rule, device and dtypes.

    Args:
        group: of the optimizer's ``param_groups``.
        state_of: see ``StateOf``.
        compiling: whether ``torch.compile`` traces the step.
        keys: by id of a parameter, the key of its noise; empty where nothing is rounded stochastically.
        stochastic: round half-precision parameters stochastically too, not only state.
    """
    rule = RULES[group["rule"]]
    settings = _settings(group, rule, compiling=compiling and not keys, stochastic=stochastic and bool(keys))
    lists: dict[tuple[Any, ...], tuple[list[tuple[Any, ...]], list[Tensor], list[int]]] = {}
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        state = state_of(parameter, group)
        # By the whole tensor: a shard of a matrix is moved by the rule of matrices.
        by = rule if rule.otherwise is None else rule.moving(parameter)
        row: tuple[Any, ...] = (parameter, gradient, state["exp_avg"], _fourth(by, state))
        # The rules are element-wise, and on DTensors each operation would cost more than the arithmetic.
        if is_dtensor(parameter) and not group["differentiable"]:
            row = local_parts(*row)
        kernel = choose(by, group, settings.lr, row)
        kind = (kernel, by, row[0].device, row[0].dtype, row[2].dtype)
        if kind not in lists:
            lists[kind] = ([], [], [])
        rows, sizes, of_rows = lists[kind]
        rows.append(row)
        if by.keeps_rms:
            sizes.append(state[RMS])
        if keys:
            of_rows.append(keys[id(parameter)])
    for (kernel, by, *_), (rows, sizes, of_rows) in lists.items():
        yield Work(
            kernel,
            tuple(zip(*rows, strict=True)),
            settings if by is rule else settings._replace(rule=by),
            sizes or None,
            of_rows or None,
            bool(group["differentiable"]),
        )


def _settings(group: Mapping[str, Any], rule: Rule, *, compiling: bool, stochastic: bool) -> StepSettings:
    beta1 = float(group["betas"][0])
    return StepSettings(
        rule,
        _lr_for_the_kernel(group, compiling and not rule.starts_corrected),
        beta1,
        current_gamma(group),
        float(group["eps"]),
        float(group["weight_decay"]),
        group["maximize"],
        group["damping"],
        group["scale"],
        started(beta1, step=coming_step(group)) if rule.starts_corrected else 1.0,
        stochastic,
        float(group["betas"][1]),
        group["update_every"],
    )


def _fourth(rule: Rule, state: Mapping[str, Tensor]) -> Any:
    return state["hessian"] if rule.has_curvature else state


def current_gamma(group: Mapping[str, Any]) -> float:
    """The group's gamma, with the corrections of its rule in it; for the step that is about to be taken."""
    gamma = float(group["gamma"])
    if not RULES[group["rule"]].starts_corrected:
        return gamma
    return corrected_gamma(gamma, betas=group["betas"], step=coming_step(group), refreshes=group["refreshes"])


def _lr_for_the_kernel(group: Mapping[str, Any], compiling: bool) -> float | Tensor:
    """A tensor where a number would be baked into a graph, else a number, which is faster."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        stays = compiling or group["capturable"] or group["differentiable"] or lr.requires_grad
        return lr.reshape(()) if stays else lr.item()
    # float64, in which a Python number is: in float32 the graph would round lr where the eager step does not.
    return torch.tensor(lr, dtype=torch.float64) if compiling and not group["differentiable"] else lr


def kernels_of(groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> list[str]:
    """Names of the kernels that move the parameters which have state, sorted; asked outside of a step."""
    found = set()
    for group in groups:
        rule, lr = RULES[group["rule"]], _lr_for_the_kernel(group, False)
        for p in group["params"]:
            if p in state:
                # The parameter stands for its gradient, which has been set to None by now.
                by = rule.moving(p)
                row: tuple[Any, ...] = (p, p.detach(), state[p]["exp_avg"], _fourth(by, state[p]))
                if is_dtensor(p) and not group["differentiable"]:
                    row = local_parts(*row)
                found.add(choose(by, group, lr, row).__name__.rpartition(".")[2])
    return sorted(found)
