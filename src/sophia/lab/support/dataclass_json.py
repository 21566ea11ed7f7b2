"""Frozen dataclasses from plain values and back: JSON and TOML in, nothing guessed.

Unknown keys, missing keys and wrong types raise ``UsageError`` with their dotted names. A field whose type is
``Annotated[..., parse]`` is read by ``parse(value, where)``; a class with ``to_plain()`` is written by it. A
field with the metadata ``LATER`` was added after runs had been named: it is written only where it differs
from its default, so that they keep their names.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from sophia.lab.support.errors import UsageError

__all__ = ["LATER", "canonical", "differences", "from_json", "to_json"]

LATER = {"later": True}

T = TypeVar("T")


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_json(config: Any) -> Any:
    """The configuration as plain dictionaries, lists, numbers and strings."""
    if hasattr(config, "to_plain"):
        return config.to_plain()
    if dataclasses.is_dataclass(config):
        return {
            f.name: to_json(value)
            for f in dataclasses.fields(config)
            for value in [getattr(config, f.name)]
            if not f.metadata.get("later") or value != f.default
        }
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    return [to_json(value) for value in config] if isinstance(config, tuple | list) else config


def from_json(kind: type[T], values: Any, *, where: str = "") -> T:
    """The inverse of `to_json`. Unknown and missing keys and wrong types raise ``UsageError`` with their
    names.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    name = where or kind.__name__.lower()
    if not isinstance(values, dict):
        raise UsageError(
            f"{name} is {values!r}, but holds several fields. Write an object with {', '.join(fields)}."
        )
    if unknown := sorted(set(values) - set(fields)):
        raise UsageError(
            f"{name} has no field {unknown[0]!r}, and a misspelt field must not be ignored silently. "
            f"The fields are {', '.join(fields)}."
        )
    missing = [
        n for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise UsageError(f"{name} lacks the field {missing[0]!r}, which has no default. Add it.")
    arguments = {n: _value(hints[n], v, f"{where}.{n}" if where else n) for n, v in values.items()}
    return kind(**arguments)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted names of the keys in which two plain values differ.

    >>> differences({"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 2, "c": [1, 2]}, "d": 0})
    ['a.b', 'd']
    """
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other and type(one) is type(other) else [where]
    absent = object()
    return [
        name
        for key in sorted({*one, *other})
        for name in differences(
            one.get(key, absent), other.get(key, absent), f"{where}.{key}" if where else str(key)
        )
    ]


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return hint.__metadata__[0](value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where=where)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} is {value!r}, but holds several values. Write a list.")
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(hint, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is not None:
        return _by_name(arguments[1], value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{where} is {value!r}, a {type(value).__name__}. Write a {hint.__name__}.")
    return value


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    if len(hints) == 1:
        return _value(hints[0], value, where)
    if type(value) in hints:
        return value
    raise UsageError(f"{where} is {value!r}, but a setting is a plain value. Write a number, true or text.")


def _by_name(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}, but holds plain values by name. Write an object of those.")
    return {name: _value(hint, inner, f"{where}.{name}") for name, inner in value.items()}
