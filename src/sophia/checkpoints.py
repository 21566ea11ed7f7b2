"""Conversion of other Sophias' state to what ``Sophia.load_state_dict`` takes.

Two things differ between implementations, and both are silent: whether h is stored multiplied by the number
of predictions B (here it is, in the official repository it is not), and how the arrays are laid out (JAX
keeps dense kernels as (in, out), torch as (out, in)). m is the same everywhere.

    opt = Sophia(model, lr=...)
    opt.load_state_dict(from_official(checkpoint["optimizer"], bs=480 * 1024))

The state of an Adam has no curvature: its second moment is the mean of g^2, which near a minimum is noise,
and off by a factor that changes along the way. It is refused; start Sophia afresh from the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.checks import check_number

__all__ = ["from_arrays", "from_official"]

_KEPT = ("lr", "betas", "weight_decay", "maximize", "capturable", "initial_lr", "params", "param_names")


def from_official(state_dict: Mapping[str, Any], *, bs: float, update_every: int = 10) -> dict[str, Any]:
    """Turn ``SophiaG.state_dict()`` of the official repository into a state of ``Sophia``.

    Its buffer ``hessian`` is an average of the squared gradient of the *mean* loss; ``step(bs=...)``
    multiplies it by the predictions in the batch each time. Here ``h = bs * hessian``, and rho is called
    gamma. Its epsilon, 1e-15 added to the denominator, becomes the optimizer's own eps.

    Args:
        state_dict: with keys ``state`` (``exp_avg``, ``hessian``, ``step``) and ``param_groups``.
        bs: what its training loop passed to ``step(bs=...)``: tokens in a whole batch, all ranks and
        micro-batches.
        update_every: its interval between two refreshes, which the state does not hold.

    Returns:
        A state for ``Sophia.load_state_dict``; the optimizer must have the same parameters in the same order
        and groups. The next refresh comes when the other run would have made it.

    Raises:
        ValueError: it is not SophiaG's.

    >>> group = {"lr": 1e-3, "betas": (0.965, 0.99), "rho": 0.04, "weight_decay": 0.1, "params": [0]}
    >>> entry = {"step": torch.tensor(20.0), "exp_avg": torch.ones(2), "hessian": torch.full((2,), 0.5)}
    >>> found = from_official({"state": {0: entry}, "param_groups": [group]}, bs=8)
    >>> found["state"][0]["hessian"], found["param_groups"][0]["gamma"], found["param_groups"][0]["step"]
    (tensor([4., 4.]), 0.04, 20)
    """
    check_number("bs", bs, above=0.0)
    check_number("update_every", update_every, at_least=1)
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "an optimizer's state has the keys 'param_groups' and 'state', but this has "
            f"{sorted(map(str, state_dict))[:5]}. If it is a whole checkpoint of the official training "
            "script, pass checkpoint['optimizer']"
        )
    for number, group in enumerate(state_dict["param_groups"]):
        if "rho" not in group:
            raise ValueError(_not_official(f"parameter group {number} has no rho", group))
    state: dict[Any, dict[str, Tensor]] = {}
    step = 0
    for number, entry in state_dict["state"].items():
        if not {"exp_avg", "hessian"} <= set(entry):
            raise ValueError(_not_official(f"parameter {number} has the state {sorted(entry)}", entry))
        state[number] = {"exp_avg": entry["exp_avg"].clone(), "hessian": entry["hessian"] * bs}
        step = max(step, int(entry.get("step", 0)))
    # It refreshes after steps k - 1, 2k - 1, ..., which is before steps k, 2k, ...
    counters = _counters(step, step - step % update_every if step >= update_every else -1, update_every)
    groups = [
        {**{name: group[name] for name in _KEPT if name in group}, "gamma": group["rho"], **counters}
        for group in state_dict["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def from_arrays(
    optimizer: torch.optim.Optimizer,
    exp_avg: Mapping[str, Any] | Sequence[Any],
    hessian: Mapping[str, Any] | Sequence[Any],
    *,
    step: int,
    times: float = 1.0,
    refreshed: int | None = None,
) -> dict[str, Any]:
    """Put arrays of another implementation (optax, levanter, your own) into a state of ``optimizer``.

    For optax's and levanter's Hutchinson estimators h is the diagonal itself: ``times=1``. If h was an
    average of squared gradients of a mean loss over B predictions, ``times=B``. Levanter averages h without
    correction as here, and corrects m when it is used, not when it is stored.

    Args:
        optimizer: a ``Sophia`` over the model's parameters; it is not changed.
        exp_avg: m by parameter name, or in the order of the parameters. Numpy arrays or tensors, in torch's
            layout.
        hessian: h, likewise.
        step: how many steps were taken.
        times: what h is multiplied by.
        refreshed: before which step h was last renewed; the last multiple of ``update_every`` by default.

    Returns:
        A state for ``optimizer.load_state_dict``.

    Raises:
        ValueError: a name or a shape does not fit.
    """
    check_number("times", times, above=0.0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ms, hs = (_in_order(optimizer, arrays, parameters) for arrays in (exp_avg, hessian))
    state: dict[int, dict[str, Tensor]] = {}
    for number, (parameter, m, h) in enumerate(zip(parameters, ms, hs, strict=True)):
        if m is None and h is None:
            continue  # frozen
        state[number] = {
            "exp_avg": _tensor(m, parameter, f"exp_avg {number}"),
            "hessian": _tensor(h, parameter, f"hessian {number}") * times,
        }
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:
        every = int(group["update_every"])
        group.update(_counters(step, step - step % every if refreshed is None else refreshed, every))
    return {"state": state, "param_groups": groups}


def _counters(step: int, refreshed: int, every: int) -> dict[str, int]:
    return {
        "step": step,
        "joined": 0,
        "refreshed": refreshed,
        "refreshes": 0 if refreshed < 0 else max(1, refreshed // every),
        "update_every": every,
    }


def _not_official(seen: str, keys: Mapping[str, Any]) -> str:
    if "gamma" in keys:
        return f"{seen}, but gamma: this is a state of Sophia already. Give it to load_state_dict as it is"
    if {"amsgrad", "exp_avg_sq"} & set(keys):
        return (
            f"{seen}: this is an Adam's state, and its second moment is no curvature: an average of g^2 "
            "that says how noisy the gradient is. Start Sophia afresh from the model's weights; m fills "
            "within 1 / (1 - beta1) = 25 steps"
        )
    return (
        f"{seen}: this is not the state of the official SophiaG, whose groups have rho and whose entries "
        "have exp_avg and hessian. For arrays of another implementation use from_arrays()"
    )


def _in_order(
    optimizer: torch.optim.Optimizer,
    arrays: Mapping[str, Any] | Sequence[Any],
    parameters: Sequence[Tensor],
) -> list[Any]:
    """An array for each parameter; None for frozen ones, which need none."""
    if not isinstance(arrays, Mapping):
        trained = [number for number, p in enumerate(parameters) if p.requires_grad]
        if len(arrays) == len(parameters):
            return list(arrays)
        if len(arrays) != len(trained):
            raise ValueError(
                f"{len(arrays)} arrays for {len(parameters)} parameters: give one for each, in the order of "
                "the parameters"
            )
        by_number = dict(zip(trained, arrays, strict=True))
        return [by_number.get(number) for number in range(len(parameters))]
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            "the optimizer does not know its parameters' names, so arrays by name have no place: build it as "
            "Sophia(model), or give the arrays in the order of the parameters"
        )
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    missing = [n for n, p in zip(names, parameters, strict=True) if n not in arrays and p.requires_grad]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} parameters have no array (first: {missing[:3]}; names given: "
            f"{sorted(arrays)[:3]}): use the names of model.named_parameters()"
        )
    return [arrays.get(name) for name in names]


def _tensor(array: Any, parameter: Tensor, what: str) -> Tensor:
    tensor = torch.as_tensor(array).detach().clone()
    if tensor.shape != parameter.shape:
        turned = tensor.ndim > 1 and tensor.shape == parameter.shape[::-1]
        hint = (
            " JAX keeps dense kernels as (in, out): transpose it"
            if turned
            else " give the same model's state"
        )
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, but the parameter has {tuple(parameter.shape)}:{hint}"
        )
    return tensor
