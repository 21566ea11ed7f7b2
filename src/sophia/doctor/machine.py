"""Checks of the device, the threads, and the paths that a step can take here."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sophia.doctor.findings import Finding
from sophia.optimizer import Sophia
from sophia.step import kernels
from sophia.step.kernels import foreach, fused_cpu, single_tensor
from sophia.step.rules import PAPER, StepSettings
from sophia.update_rule import sophia_step

__all__ = ["check_machine"]

PATHS: dict[ModuleType, str] = {
    single_tensor: "tensor by tensor",
    foreach: "foreach",
    fused_cpu: "compiled",
}
WHY = {
    single_tensor: "no faster path takes these tensors",
    foreach: "few passes over lists of tensors",
    fused_cpu: "one pass over memory on a CPU",
}
SETTINGS: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.1}


def check_machine() -> list[Finding]:
    """Look at the device, the threads and the paths of the step."""
    return [*_device(), *_threads(), *_compiled(), *_choices(), *_numbers()]


def _device() -> Iterator[Finding]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("device", "ok", f"cuda: {', '.join(names)}", {"device": "cuda", "names": names})
    elif torch.backends.mps.is_available():
        yield Finding("device", "ok", "mps", {"device": "mps"})
    else:
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, but sees no device" if built else "this torch is built for a CPU"
        yield Finding("device", "ok", f"cpu ({why})", {"device": "cpu", "built_for": built})


def _threads() -> Iterator[Finding]:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data = {"threads": threads, "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    if threads > cores:
        yield Finding(
            "threads",
            "note",
            f"torch computes with {threads} threads, but this process may use {cores} cores: they stand in "
            f"each other's way. Write: OMP_NUM_THREADS={cores}, or torch.set_num_threads({cores})",
            data,
        )
    else:
        yield Finding("threads", "ok", f"threads of torch: {threads}; cores: {cores}", data)


def _compiled() -> Iterator[Finding]:
    """Whether the compiled kernel is there, and how it came or why it did not."""
    reason, compiler = fused_cpu.unavailable(), _compiler()
    library = Path(fused_cpu.__file__).with_name("_fused_cpu.so")
    source = Path(fused_cpu.__file__).with_name("fused_cpu.c")
    data = {"library": str(library), "compiler": compiler, "reason": reason}
    if reason is not None:
        advice = (
            f"A compiler is here ({compiler}): reinstall with pip install --force-reinstall --no-deps "
            "--no-binary torch-sophia torch-sophia, or run python hatch_build.py in a clone"
            if compiler
            else "Install a C compiler and reinstall, or go on without: the foreach path serves"
        )
        yield Finding("paths of the step", "note", f"{reason}. {advice}", data)
        return
    built = datetime.datetime.fromtimestamp(library.stat().st_mtime).isoformat(" ", "minutes")
    if source.exists() and source.stat().st_mtime > library.stat().st_mtime + 60:
        yield Finding(
            "paths of the step",
            "note",
            f"the compiled kernel ({built}) is older than its source: run python hatch_build.py again",
            data,
        )
    else:
        yield Finding(
            "paths of the step",
            "ok",
            f"the compiled kernel is there, built {built} when the package was installed (or by "
            f"hatch_build.py): {library}",
            data,
        )


def _compiler() -> str | None:
    """The C compiler that an installation would use, in its own words."""
    command = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if command is None:
        return None
    try:
        said = subprocess.run(
            [*command.split(), "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0] if said else command


def _choices() -> Iterator[Finding]:
    """What Sophia chooses by default for the usual parameters."""
    (group,) = Sophia([torch.nn.Parameter(torch.zeros(3))], mode="manual").param_groups
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen: dict[str, str] = {}
    parts: list[str] = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            state = torch.zeros(3, device=device)
            parameter = state.to(dtype)
            path = kernels.choose(PAPER, group, 1e-3, (parameter, parameter, state, state))
            name = f"{str(dtype).removeprefix('torch.')} on {device}"
            chosen[name] = PATHS[path]
            parts.append(f"{name}: {PATHS[path]} ({WHY[path]})")
    yield Finding("paths of the step", "ok", "; ".join(parts), {"chosen": chosen})


def _numbers() -> Iterator[Finding]:
    """Whether every path that is there gives the numbers of the rule."""
    g = torch.Generator().manual_seed(0)
    theta, grad, m, h = (torch.randn(10_000, generator=g) for _ in range(4))
    expected, _ = sophia_step(theta.double(), grad.double(), m.double(), h.double(), **SETTINGS)
    errors: dict[str, float] = {}
    for path, name in PATHS.items():
        if path is fused_cpu and fused_cpu.unavailable():
            continue
        row: list[list[Tensor]] = [[t.clone()] for t in (theta, grad, m, h)]
        path.step(*row, StepSettings(PAPER, **SETTINGS))
        errors[name] = float((row[0][0].double() - expected).abs().max())
    bad = [name for name, error in errors.items() if not error < 1e-5]
    if bad:
        yield Finding(
            "paths of the step",
            "wrong",
            f"{', '.join(bad)}: other numbers than the rule of sophia.update_rule (off by "
            f"{max(errors[name] for name in bad):.1e}). The library is another version's, or broken: "
            "reinstall, and pass fused=False until then",
            {"errors": errors},
        )
    else:
        yield Finding(
            "paths of the step", "ok", f"{', '.join(errors)}: the numbers of the rule", {"errors": errors}
        )
