"""Frozen dataclasses that check their fields, from JSON and TOML and back: nothing guessed.

`checked_dataclass` is pydantic's dataclass, strict: the types of the fields say what they hold, bounds
included (``Annotated[int, Ge(1)]``), and hold for files, constructors and ``dataclasses.replace`` alike.
Unknown keys, missing keys and bad values raise ``UsageError`` with their dotted names. Relations between
fields are checked in ``__post_init__``. A class with ``to_plain()`` is written by it. A field with the
metadata ``LATER`` was added after runs had been named: it is written only where it differs from its default,
so that they keep their names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic
import pydantic.dataclasses
from pydantic_core import ErrorDetails

from sophia.lab.support.errors import UsageError

if TYPE_CHECKING:  # type checkers know the fields of this one alone, and that `replace` takes it
    from dataclasses import dataclass as checked_dataclass

__all__ = ["LATER", "canonical", "checked_dataclass", "differences", "from_json", "to_json"]

LATER = {"later": True}

T = TypeVar("T")

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

if not TYPE_CHECKING:

    def checked_dataclass(*, frozen: bool) -> Callable[[type[T]], type[T]]:
        """As ``dataclasses.dataclass``; what the types of the fields do not allow raises ``UsageError``."""

        def decorate(kind: type[T]) -> type[T]:
            made = pydantic.dataclasses.dataclass(frozen=frozen, config=_STRICT)(kind)
            construct = made.__init__

            @functools.wraps(construct)
            def __init__(self: T, *values: Any, **named: Any) -> None:
                try:
                    construct(self, *values, **named)
                except pydantic.ValidationError as error:
                    raise _refusal(made, error, where=made.__name__.lower()) from None

            made.__init__ = __init__
            return made

        return decorate


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


def from_json(kind: type[T], values: Any) -> T:
    """The inverse of `to_json`, for a `checked_dataclass`. Raises ``UsageError`` that names every key at
    fault.
    """
    # Through text: read strictly, a list is a tuple and an object a dataclass in JSON alone. TOML has dates
    # beside, which no field here holds; as text they are refused with their key like any other text.
    text = json.dumps(values, default=str)
    try:
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        raise _refusal(kind, error) from None


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


def _refusal(kind: type, error: pydantic.ValidationError, *, where: str = "") -> UsageError:
    """A line for each key at fault."""
    lines = [_line(kind, detail, where) for detail in error.errors(include_url=False)]
    return UsageError("\n".join(dict.fromkeys(lines)))  # a union has one error for each of its types


def _line(kind: type, detail: ErrorDetails, where: str) -> str:
    hint: Any = kind
    holder, path = where or kind.__name__.lower(), where
    location = list(detail["loc"])
    at_fault = location.pop() if detail["type"] in ("missing", "unexpected_keyword_argument") else None
    for key in location:
        inner = _inside(hint, key)
        if inner is None:
            break
        name, hint = inner
        path = f"{path}{name}" if name.startswith("[") or not path else f"{path}.{name}"
        holder = path
    if detail["type"] == "missing":
        return f"{holder} lacks the field {at_fault!r}, which has no default. Add it."
    if detail["type"] == "unexpected_keyword_argument":
        return (
            f"{holder} has no field {at_fault!r}, and a misspelt field must not be ignored silently. "
            f"The fields are {_fields(hint)}."
        )
    # What a type's own reader says (`search_space.Kind`) is text of ours.
    own = detail.get("ctx", {}).get("error")
    value, expected = detail["input"], _expected(hint)
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("a number", "a finite number")
    return f"{holder} is {value!r}{own or f': write {expected}.'}"


def _inside(hint: Any, key: int | str) -> tuple[str, Any] | None:
    """The name and the type of what lies under a key; None where nothing does (the members of a union)."""
    hint = _bare(hint)
    if dataclasses.is_dataclass(hint):
        names = [f.name for f in dataclasses.fields(hint)]
        name = names[key] if isinstance(key, int) else key
        return name, typing.get_type_hints(hint, include_extras=True)[name]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"[{key}]", arguments[0] if arguments[-1] is ... else arguments[int(key)]
    if typing.get_origin(hint) is Mapping:
        return str(key), arguments[1]
    return None


def _bare(hint: Any) -> Any:
    """The type without what is said about it, and without None."""
    if typing.get_origin(hint) is typing.Annotated:
        return _bare(typing.get_args(hint)[0])
    others = [a for a in typing.get_args(hint) if a is not type(None)]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _bare(others[0]) if len(others) == 1 else hint
    return hint


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _expected(hint: Any) -> str:
    """What to write for a type, bounds included.

    >>> from annotated_types import Ge, Interval
    >>> _expected(typing.Annotated[int, Ge(0)]), _expected(typing.Annotated[float, Interval(ge=0, le=1)])
    ('a whole number from 0', 'a number from 0 to 1')
    """
    others = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Annotated:
        ends = {
            word: end
            for about in hint.__metadata__
            for name, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
            if (end := getattr(about, name, None)) is not None
        }
        return " ".join([_expected(others[0]), *(f"{word} {end}" for word, end in ends.items())])
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in others)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        *most, last = (_expected(other) for other in others)
        return f"{', '.join(most)} or {last}" if most else last
    if dataclasses.is_dataclass(hint):
        return f"a table with the fields {_fields(hint)}"
    if typing.get_origin(hint) is tuple:
        return "a list"
    if typing.get_origin(hint) is Mapping:
        return "a table of values by name"
    return _WORDS[hint]


def _fields(hint: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(_bare(hint)))
