"""Sophia: the second-order optimizer of arXiv 2305.14342 as a one-line drop-in for AdamW in PyTorch.

    # was: opt = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    opt = Sophia.from_adamw({"lr": 6e-4, "weight_decay": 0.1}, model)

That is half of AdamW's lr, right for the published rule; with ``rule="damped"`` it is the whole, with
``rule="spectral"`` four times it.

The equation is in ``sophia.update_rule``, the optimizer in ``sophia.optimizer``, the estimators in
``sophia.curvature``. The lab (``sophia.lab``, command ``sophia``) needs ``pip install 'torch-sophia[lab]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sophia import curvature, likelihoods
    from sophia.checks import SophiaWarning
    from sophia.diagnostics import advice
    from sophia.optimizer import Sophia

__version__ = "0.1.0"

__all__ = ["Sophia", "SophiaWarning", "__version__", "advice", "curvature", "likelihoods"]

_HOMES = {"Sophia": "optimizer", "SophiaWarning": "checks", "advice": "diagnostics"}


if not TYPE_CHECKING:  # a checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        """A name at its first use: torch takes seconds, which `sophia --help` need not wait for."""
        if name in _HOMES:
            value = getattr(importlib.import_module(f"sophia.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        try:
            return importlib.import_module(f"sophia.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"sophia.{name}":
                raise  # of what that module needs
            raise AttributeError(f"module 'sophia' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
