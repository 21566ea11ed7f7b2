"""Classes by their dotted path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sophia.doctor.given_model import SubjectError, named
from sophia.lab.support.errors import UsageError

__all__ = ["load_class"]


def load_class(path: str) -> Callable[..., Any]:
    """The class named by ``module:Class``, of an installed package or of the working folder. Raises
    ``UsageError`` that says what is wrong with the path.
    """
    try:
        found = named(path)
    except SubjectError as error:
        raise UsageError(f"{error}.") from error
    if not callable(found):
        raise UsageError(
            f"{path!r} is a {type(found).__name__}, not a class, nor a function that could stand for one."
        )
    return found  # type: ignore[no-any-return]
