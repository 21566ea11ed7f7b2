"""TOML files as checked dataclasses: those of the user and those in the package."""

from __future__ import annotations

import importlib.resources
import tomllib
from pathlib import Path
from typing import TypeVar

from sophia.lab.support.dataclass_json import from_json
from sophia.lab.support.errors import UsageError

__all__ = ["from_toml", "packaged"]

T = TypeVar("T")


def from_toml(kind: type[T], path: Path, *, page: str) -> T:
    """What a file says. Raises ``UsageError`` that names the file and what is wrong in it; ``page`` explains
    one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as a {kind.__name__.lower()} ({error}). "
            f"Give a TOML file; {page} explains one."
        ) from None
    try:
        return from_json(kind, values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def packaged(package: str, folder: str) -> dict[str, Path]:
    """The TOML files in a folder of a package: name and file, in the order of their names."""
    found = Path(str(importlib.resources.files(package) / folder))
    return {path.stem: path for path in sorted(found.glob("*.toml"))}
