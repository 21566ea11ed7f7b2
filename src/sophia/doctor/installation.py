"""Checks of versions, of other distributions with an import package called sophia, of overwritten files."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

import sophia
from sophia.doctor.findings import Finding

__all__ = ["check_installation"]

NAME = "torch-sophia"
OLDEST_TORCH = (2, 6)
SAFE_TORCH = (2, 10)
HOSTS = ("transformers", "accelerate", "lightning", "peft", "deepspeed", "torchtitan", "numpy", "optuna")


def check_installation(*, providers: Mapping[str, Sequence[str]] | None = None) -> list[Finding]:
    """Look at what is installed.

    Args:
        providers: import package -> names of the distributions that bring it; read from the environment by
            default.
    """
    if providers is None:
        providers = importlib.metadata.packages_distributions()
    return [*_versions(), *_namesakes(providers), *_files()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, NAME: sophia.__version__}
    versions |= {name: found for name in HOSTS if (found := _version(name)) is not None}
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    number = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if number < OLDEST_TORCH:
        yield Finding(
            "versions", "wrong", f"{text}. torch 2.6 or newer is needed: pip install -U torch", versions
        )
    else:
        yield Finding("versions", "ok", text, versions)
        if number < SAFE_TORCH:
            yield Finding(
                "versions",
                "note",
                "torch.load(weights_only=True) of torch below 2.10 can be made to corrupt memory "
                "(CVE-2026-24747): load no checkpoints of others, or pip install -U torch",
            )
    installed = _version(NAME)
    if installed is None:
        yield Finding(
            "versions",
            "note",
            f"{NAME} is not installed: it is imported from {Path(sophia.__file__).parent}",
            {"imported_from": str(Path(sophia.__file__).parent)},
        )
        return
    if installed != sophia.__version__:
        yield Finding(
            "versions",
            "wrong",
            f"{NAME} {installed} is installed, but {sophia.__version__} is imported from "
            f"{Path(sophia.__file__).parent}: another copy comes first on the path (PYTHONPATH, the working "
            "folder). Remove it, or reinstall",
        )
    missing = [name for name in _needed_by_the_lab() if _version(name) is None]
    if missing:
        yield Finding(
            "versions",
            "note",
            f"the lab (sophia compare and the other commands) cannot run without {', '.join(missing)}. "
            f"Write: pip install '{NAME}[lab]'",
            {"missing": missing},
        )


def _needed_by_the_lab() -> list[str]:
    lines = importlib.metadata.requires(NAME) or []
    found = (re.match(r"([A-Za-z0-9._-]+).*;.*extra\s*==\s*['\"]lab['\"]", line) for line in lines)
    return [match[1] for match in found if match]


def _namesakes(providers: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    others = sorted({name for name in providers.get("sophia", ()) if _plain(name) != NAME})
    if others:
        names = " ".join(others)
        yield Finding(
            "name",
            "wrong",
            f"{', '.join(others)} also installs an import package called sophia: their files lie in one "
            f"folder and overwrite each other. Write: pip uninstall {names} && pip install --force-reinstall "
            f"--no-deps {NAME}",
            {"namesakes": others},
        )
    else:
        yield Finding("name", "ok", "no other distribution brings an import package called sophia")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _files() -> Iterator[Finding]:
    """Compare the files of the package with the hashes that the installer wrote down."""
    try:
        files = importlib.metadata.files(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return
    recorded = [file for file in files if file.parts[0] == "sophia" and file.hash is not None]
    if not recorded:
        return  # an editable installation: the files are the clone's
    imported = Path(sophia.__file__).resolve().parent
    installed = Path(str(recorded[0].locate())).resolve()
    if imported not in installed.parents:
        yield Finding(
            "name",
            "note",
            f"sophia is imported from {imported}, not from the installed {installed.parent}: PYTHONPATH or "
            "the working folder comes first",
        )
    changed = [str(file) for file in recorded if file.suffix == ".py" and not _unchanged(file)]
    if changed:
        yield Finding(
            "name",
            "wrong",
            f"{len(changed)} files of the package are not those that were installed "
            f"({', '.join(changed[:3])}): another distribution, or a hand, has overwritten them. Write: pip "
            f"install --force-reinstall --no-deps {NAME}",
            {"changed": changed},
        )


def _unchanged(file: importlib.metadata.PackagePath) -> bool:
    path = Path(str(file.locate()))
    assert file.hash is not None
    if not path.exists():
        return False
    digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value
