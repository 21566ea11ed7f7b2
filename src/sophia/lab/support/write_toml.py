"""Writing TOML, which the standard library only reads: tables, lists, numbers, text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["write_toml"]


def write_toml(values: Mapping[str, Any]) -> str:
    """The text of a TOML file; what is None is left out. ``tomllib.loads`` gives the values back.

    >>> print(write_toml({"name": "x", "search": {"trials": 2, "spaces": {"a": {"lr": {"low": 1e-3}}}}}))
    name = "x"
    <BLANKLINE>
    [search]
    trials = 2
    <BLANKLINE>
    [search.spaces.a.lr]
    low = 0.001
    <BLANKLINE>
    """
    return "\n".join(_table(values, "")).lstrip("\n") + "\n"


def _table(values: Mapping[str, Any], where: str) -> list[str]:
    plain = {k: v for k, v in values.items() if v is not None and not isinstance(v, Mapping)}
    inner = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    lines = ["", f"[{where}]"] if where and (plain or not inner) else []
    lines += [f"{_key(name)} = {_value(value)}" for name, value in plain.items()]
    for name, value in inner.items():
        lines += _table(value, f"{where}.{_key(name)}" if where else _key(name))
    return lines


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isalnum() and bare.isascii() else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
