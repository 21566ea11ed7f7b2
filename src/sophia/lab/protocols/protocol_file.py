"""Protocols on disk: TOML files of the user's, those of the package, which are the presets, and the
``protocol.json`` of a record, which was frozen before its first run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import read_json
from sophia.lab.support.toml_files import from_toml, packaged

__all__ = ["chosen", "load", "presets", "text_of"]


def presets() -> dict[str, Path]:
    """The packaged protocols: name and file."""
    return packaged("sophia.lab.protocols", "presets")


def load(path: Path) -> Protocol:
    """Read and check a file. Raises ``UsageError`` that names the file and what is wrong in it."""
    by_record = path.suffix == ".json"
    protocol = _of_a_record(path) if by_record else from_toml(Protocol, path, page="docs/protocols.md")
    try:
        protocol.check()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return protocol


def _of_a_record(path: Path) -> Protocol:
    content = read_json(path)
    if not isinstance(content.get("protocol"), dict):
        raise UsageError(
            f"{path} is no protocol.json of a comparison, which has the whole protocol under 'protocol'. "
            "Give one, or a TOML file; docs/protocols.md explains that."
        )
    try:
        return from_json(Protocol, content["protocol"])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def chosen(preset: str | None, file: Path | None) -> Protocol:
    """The protocol of a command line: a packaged one by name ("first" unless given), or a file's."""
    if preset is not None and file is not None:
        raise UsageError(
            f"--preset {preset} and --protocol {file} are both given, and each is a whole protocol. "
            "Give one of them."
        )
    if file is not None:
        return load(file)
    known, name = presets(), preset or "first"
    if name not in known:
        raise UsageError(
            f"There is no preset {name!r}. Choose from: {', '.join(known)}; or give a file with --protocol."
        )
    return load(known[name])


def text_of(protocol: Protocol) -> str:
    """The protocol as a TOML file that `load` reads."""
    return tomli_w.dumps(_without_none(to_json(protocol)))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is None is left out, and read as its default."""
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
