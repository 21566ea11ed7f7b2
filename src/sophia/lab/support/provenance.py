"""Where a number comes from: versions, processor, commit. No user names, host names, paths or environment
variables.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

__all__ = ["code", "describe"]


def describe(*, threads: int, device: str) -> dict[str, str | int | None]:
    """What a result has to be read with."""
    import torch

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "sophia": importlib.metadata.version("torch-sophia"),
        "commit": _commit(),
        "code": code(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]} ({len(names)} logical)" if names else platform.processor() or platform.machine()


@functools.cache
def code() -> str:
    """A hash of this package's sources: it tells an edited or installed copy apart where no commit can."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".c")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return "sha256:" + digest.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of a checkout, with a plus if sources differ from it; None for an installed package."""
    root = Path(__file__).parents[4]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no", "src") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
