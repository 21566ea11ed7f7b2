"""Classes by their dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from sophia.lab.errors import UsageError

__all__ = ["load_class"]


def load_class(path: str) -> Callable[..., Any]:
    """The class named by ``module:Class``, of an installed package or of the working folder. Raises
    ``UsageError`` that says what is wrong with the path.
    """
    module, colon, name = path.partition(":")
    if not (colon and module and name):
        raise UsageError(f"{path!r} does not name a class. Write module:Class, for instance sophia:Sophia.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind everything: a file there must not hide an installed package
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UsageError(
            f"{module!r} cannot be imported ({error}). Install it, or run where it can be found."
        ) from error
    except AttributeError as error:
        raise UsageError(f"{module!r} has no {name!r}. Check the name of the class.") from error
    if not callable(found):
        raise UsageError(
            f"{path!r} is a {type(found).__name__}, not a class or function that makes an optimizer."
        )
    return found  # type: ignore[no-any-return]
