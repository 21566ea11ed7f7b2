"""Compiles the CPU kernels into the wheel if there is a C compiler; without one the package is pure
Python.

Also runs by hand: ``python hatch_build.py`` puts the library beside its source, for an editable install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object  # type: ignore[assignment, misc]

KERNELS = Path(__file__).parent / "src" / "sophia" / "step" / "kernels"
SOURCES = (KERNELS / "fused_cpu.c", KERNELS / "matrices_cpu.c")
LIBRARY = KERNELS / "_fused_cpu.so"
FLAGS = (
    "-O3",
    "-std=gnu99",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-ffp-contract=off",
)


def compile_kernel() -> str | None:
    """Build the library; return why not, or None if it stands there."""
    if sys.platform == "win32":
        return "no build for Windows yet"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler found"
    # Into a temporary name: a library that is in use must not change under its process.
    unfinished = LIBRARY.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [*compiler.split(), *FLAGS, *map(str, SOURCES), "-o", str(unfinished), "-lm"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"{compiler} failed: {done.stderr.strip()[-500:]}"
    os.replace(unfinished, LIBRARY)
    return None


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform; a failure only leaves the kernel out."""
        reason = compile_kernel()
        if reason is not None:
            self.app.display_warning(f"without the compiled CPU kernels: {reason}")
            LIBRARY.unlink(missing_ok=True)
            return
        build_data["artifacts"].append(f"src/sophia/step/kernels/{LIBRARY.name}")
        if version != "editable":
            build_data["pure_python"] = False
            # No Python ABI is used, so one wheel serves every Python.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    print(compile_kernel() or LIBRARY)
