"""Contenders from other people's code: a class by its dotted path, or offered by an installed package.

The class may say four things about itself, all optional, all plain values so that it need not import this
package: ``sophia_defaults`` (settings by name), ``sophia_space`` (what a search may vary, as in a protocol
file), ``sophia_gradients`` (extra gradient evaluations of a step, a number) and ``sophia_closure`` (true if
``step`` needs a closure that computes loss and gradients again). Without them the settings are
the arguments of its constructor that have plain defaults, and the space is a decade of learning rates to each
side of the default.

A run of such a class carries its path and its code (version of the distribution, or a hash of the source)
among the settings: changed code is another run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sophia.lab.config.run import Setting
from sophia.lab.config.search_space import WARMUP, LogRange, Space, read_kind
from sophia.lab.optimizers.contender import Contender, Settings, matrices_decayed
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.import_by_path import load_class

__all__ = ["CLASS", "CODE", "GROUP", "contender", "offered"]

GROUP = "sophia.contenders"
"""Entry points of this group are contenders: name = "module:Class"."""
CLASS, CODE = "class", "code"
"""Settings that say which class a run is of."""
_TYPES = (bool, int, float, str)


def offered() -> dict[str, str]:
    """Contenders of installed packages: name and ``module:Class``."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


def contender(label: str, path: str, *, code: str | None = None) -> Contender:
    """The contender made from a class. With ``code``, raises ``LabError`` if the class is no longer that."""
    make = load_class(path)
    now = _code(make)
    if code is not None and code != now:
        raise LabError(
            f"{label}: the run was planned with the code {code} of {path}, and now it is {now}. "
            "Going on would mix two optimizers. Restore that code, or start another comparison."
        )
    defaults = _defaults(make, path)
    return Contender(
        name=label,
        title=f"{path} ({now})",
        build=functools.partial(_build, make, path),
        defaults={**defaults, CLASS: path, CODE: now},
        space=_space(make, path, defaults),
        state_per_parameter=0,
        gradients=functools.partial(_gradients, make),
        closure=bool(getattr(make, "sophia_closure", False)),
    )


def _build(make: Callable[..., Any], path: str, model: nn.Module, settings: Settings, seed: int) -> Optimizer:
    given: dict[str, Any] = {k: v for k, v in settings.items() if k not in (CLASS, CODE)}
    names = inspect.signature(make).parameters
    if "betas" in names and "beta1" in given and "beta1" not in names:
        given["betas"] = (given.pop("beta1"), given.pop("beta2"))
    if "seed" in names:
        given.setdefault("seed", seed)
    try:
        if _takes_model(make):
            optimizer = make(model, **given)
        else:  # the groups carry the decay
            groups = matrices_decayed(model, settings)
            if "weight_decay" not in names:
                given.pop("weight_decay", None)
            optimizer = make(groups, **given)
    except Exception as error:
        raise LabError(
            f"{path} could not be built with {given} ({type(error).__name__}: {error}). "
            "Give it settings that it takes, in the protocol or as its sophia_defaults."
        ) from error
    if any("lr" not in group for group in optimizer.param_groups):
        raise LabError(
            f"{path} has parameter groups without lr, so the lab cannot apply its schedule. Derive it from "
            "torch.optim.Optimizer with lr among the defaults."
        )
    return optimizer  # type: ignore[no-any-return]


def _takes_model(make: Callable[..., Any]) -> bool:
    """Whether the first argument is the model and not parameters: by its name or its annotation."""
    first = next(iter(inspect.signature(make).parameters.values()), None)
    if first is None:
        return False
    annotation = (
        first.annotation if isinstance(first.annotation, str) else getattr(first.annotation, "__name__", "")
    )
    return "model" in first.name or first.name == "module" or annotation.rpartition(".")[2] == "Module"


def _defaults(make: Callable[..., Any], path: str) -> dict[str, Setting]:
    declared = getattr(make, "sophia_defaults", None)
    found: dict[str, Setting] = {}
    if isinstance(declared, Mapping):
        if bad := [k for k, v in declared.items() if type(v) not in _TYPES or k in (CLASS, CODE)]:
            raise UsageError(
                f"{path}.sophia_defaults[{bad[0]!r}] is {declared[bad[0]]!r}: a setting is a number, true, "
                f"false or text, and not named {CLASS} or {CODE}. Write plain values."
            )
        found = dict(declared)
    else:
        for name, parameter in inspect.signature(make).parameters.items():
            value = parameter.default
            if name == "betas" and isinstance(value, tuple) and len(value) == 2:
                found |= {"beta1": float(value[0]), "beta2": float(value[1])}
            elif type(value) is int and "float" in str(parameter.annotation):
                found[name] = float(value)  # torch writes `weight_decay: float = 0`
            elif type(value) in _TYPES:
                found[name] = value
    if type(found.get("lr")) is not float:
        raise UsageError(
            f"{path} says no learning rate: its lr is {found.get('lr')!r}, and the lab starts from a float. "
            'Give the class sophia_defaults = {"lr": 1e-3, ...}.'
        )
    return found


def _space(make: Callable[..., Any], path: str, defaults: Settings) -> Space:
    declared = getattr(make, "sophia_space", None)
    if declared is None:
        lr = float(defaults["lr"])
        return {"lr": LogRange(lr / 10, lr * 10)}
    if unknown := [name for name in declared if name not in defaults and name != WARMUP]:
        raise UsageError(
            f"{path}.sophia_space has {unknown[0]!r}, which is no setting of the class. Its settings are "
            f"{', '.join(defaults)}, and warmup."
        )
    return {name: read_kind(kind, f"{path}.sophia_space[{name!r}]") for name, kind in declared.items()}


def _gradients(make: Callable[..., Any], settings: Settings) -> float:
    return float(getattr(make, "sophia_gradients", 0.0))


def _code(make: Callable[..., Any]) -> str:
    """Version of the distribution that the class belongs to, or a hash of its file if there is none or its
    files may be edited.
    """
    module = inspect.getmodule(make)
    top = (module.__name__ if module else "").partition(".")[0]
    for name in importlib.metadata.packages_distributions().get(top, ()):
        distribution = importlib.metadata.distribution(name)
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if not origin.get("dir_info", {}).get("editable"):
            return f"{name} {distribution.version}"
    source = getattr(sys.modules.get(module.__name__ if module else ""), "__file__", None)
    data = Path(source).read_bytes() if source else repr(make).encode()
    return "sha256:" + hashlib.sha256(data).hexdigest()[:12]
