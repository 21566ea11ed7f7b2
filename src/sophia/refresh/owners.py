"""Modules that own all parameters of an optimizer, found among all that are alive.

A host that builds ``cls(model.parameters(), **settings)`` hands over no model, and a parameter does not know
its module. So the modules are looked for where the garbage collector keeps them: once, when the optimizer is
built (tens of milliseconds with transformers imported).
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["name_of", "owners_of", "tensors_given"]

_SHOWN = 3


def owners_of(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The modules that can be called and hold all of these parameters that are not frozen, and any others,
    from the outermost to the innermost. What is frozen may lie elsewhere (a teacher beside the model).

    Raises:
        ValueError: there is none.
    """
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    holders: dict[int, list[nn.Module]] = defaultdict(list)
    parameters = [parameter for parameter in parameters if parameter.requires_grad] or parameters
    wanted = {id(parameter) for parameter in parameters}
    for module in _alive():
        # A module that is being built may have neither yet.
        for child in vars(module).get("_modules", {}).values():
            parents[id(child)].append(module)
        for parameter in vars(module).get("_parameters", {}).values():
            if id(parameter) in wanted:
                holders[id(parameter)].append(module)
    some = parameters[0]
    found = [m for m in _with_ancestors(holders[id(some)], parents) if wanted <= _held(m)]
    found = [module for module in found if _can_be_called(module)]
    if not found:
        every = (holder for several in holders.values() for holder in several)
        raise ValueError(_nobody(len(wanted), _parts(_with_ancestors(every, parents), wanted)))
    return sorted(found, key=lambda module: -sum(1 for _ in module.modules()))


def tensors_given(params: Any) -> tuple[Any, list[Tensor]]:
    """What an optimizer of torch was given, with its generators read into lists, and the tensors in it; those
    alone that stand where torch takes them.
    """
    if isinstance(params, Tensor):
        return params, []
    given = list(params)
    if not given or not isinstance(given[0], dict):
        return given, _tensors(given)
    tensors: list[Tensor] = []
    groups = []
    for group in given:
        members = group.get("params") if isinstance(group, dict) else None
        if isinstance(members, Tensor):
            tensors.append(members)
        elif members is not None and not isinstance(members, set):  # torch refuses sets
            members = list(members)
            tensors += _tensors(members)
            group = {**group, "params": members}
        groups.append(group)
    return groups, tensors


def name_of(module: nn.Module) -> str:
    """What messages call a module."""
    return type(module).__name__


def _tensors(members: Iterable[Any]) -> list[Tensor]:
    unnamed = (m[1] if isinstance(m, tuple) and len(m) == 2 else m for m in members)
    return [member for member in unnamed if isinstance(member, Tensor)]


def _alive() -> list[nn.Module]:
    # By the type: isinstance() asks an object for its class, and a proxy may do anything then.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]


def _with_ancestors(modules: Iterable[nn.Module], parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += parents[id(module)]
    return list(found.values())


def _held(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _can_be_called(module: nn.Module) -> bool:
    """Not ``nn.ModuleList`` and its like, which have no forward."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _parts(modules: Iterable[nn.Module], wanted: set[int]) -> list[tuple[str, int]]:
    """The modules that hold the most, one for each part that is held, and how many they hold."""
    by_part: dict[frozenset[int], nn.Module] = {}
    for module in modules:
        part = frozenset(_held(module) & wanted)
        # The innermost of those that hold the same is the model inside of wrappers.
        if _can_be_called(module) and (part not in by_part or _size(module) < _size(by_part[part])):
            by_part[part] = module
    largest: list[frozenset[int]] = []
    for part in sorted(by_part, key=len, reverse=True):
        if not any(part < other for other in largest):
            largest.append(part)
    return [(name_of(by_part[part]), len(part)) for part in largest]


def _size(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


def _nobody(number: int, parts: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{name} holds {held} of {number}" for name, held in parts[:_SHOWN])
    seen = shown + (", ..." if len(parts) > _SHOWN else "") if parts else "no module alive holds any"
    frozen = (
        "; modules made before gc.freeze() cannot be found" if gc.get_freeze_count() and not parts else ""
    )
    return (
        f"Sophia got parameters but no model, and no module that can be called holds all {number} of them "
        f"({seen}{frozen}): then step() could not refresh the Hessian, which runs training forwards again. "
        "Pass the module that is called, Sophia(model, ...) or Sophia(params, model=model, ...). Where "
        "several modules are trained together, call them inside the forward of one that holds them all, or "
        "take one Sophia for each. mode='manual' leaves the refreshes to you"
    )
