"""Writing files so that a final name never holds half of anything."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sophia.lab.support.errors import LabError, UsageError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock; there two writers are not noticed
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "checked_name",
    "existing",
    "locked",
    "out_of_space_named",
    "plain",
    "read_json",
    "sync_folder",
    "write_atomically",
    "write_json",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")


def checked_name(name: object, what: str = "name") -> str:
    """Return the name if it can be no path: letters, digits and ``._+=-``, at most 128. Raises
    ``UsageError``.

    >>> checked_name("sophia-g")
    'sophia-g'
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise UsageError(
            f"The {what} {name!r} may lead out of its folder. Use letters, digits and . _ + = - only, 128 "
            f"at most."
        )
    return name


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write through a temporary file in the same folder, then rename: readers see the old file or the whole
    new one.

    The data are on the disk before the name changes, the name before this returns. Raises ``LabError`` if the
    disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with out_of_space_named(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes files that only the owner reads
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write JSON for people and programs, atomically. NaN and infinity are refused, since JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises ``UsageError`` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as JSON ({error}). Restore it, or use another folder."
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object. Restore it, or use another folder.")
    return value


def plain(value: Any) -> Any:
    """The value with NaN and infinity as None, in lists and mappings too; JSON has none of them.

    >>> plain({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def out_of_space_named(path: Path) -> Iterator[None]:
    """Turn a full disk into an error that says so, and what remains."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabError(
                f"No space left on the disk while writing {path.name}; what was saved before is intact. "
                "Free some space and give the same command again."
            ) from error
        raise


@contextlib.contextmanager
def locked(folder: Path, *, what: str) -> Iterator[None]:
    """Hold the folder alone. The lock ends with its process, however that ends. Raises ``LabError`` if it is
    held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LabError(
                    f"Another process is writing the {what} {folder.name}; two writers would mix their "
                    f"records. "
                    "Wait for it, or stop it first."
                ) from None
        yield


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())
