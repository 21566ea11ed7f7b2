"""Peak memory of training with one optimizer, in a process of its own: ``python -m sophia.lab.bench.memory``.

On a CPU it is resident memory above that of the process before the model was made (the high-water mark,
reset after a warm-up where the system can do that, which is Linux); on a GPU what torch's allocator had out.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from sophia.lab.bench import methods, problem
from sophia.lab.support.errors import LabError

__all__ = ["peak_bytes"]

WARM, STEPS = 3, 6


def peak_bytes(what: str, method: str, *, threads: int, device: str) -> int | None:
    """Peak bytes while a new process trains ``what`` with ``method``; None where they cannot be read.

    Raises ``LabError`` with its words if that process fails.
    """
    command = [sys.executable, "-m", __name__, what, method, str(threads), device]
    paths = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise LabError(
            f"the process that measures the memory of {method} failed: {done.stderr.strip()[-400:]}"
        )
    found: int | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(what: str, method: str, device: str) -> int | None:
    before = _resident("VmRSS")
    trainer = methods.METHODS[method].make(problem.make(what, device))
    for _ in range(WARM):
        trainer.step()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif before is not None:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        trainer.step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    after = _resident("VmHWM")
    return None if before is None or after is None else after - before


def _resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file or it may not be reset."""
    status = Path("/proc/self/status")
    if not (status.exists() and os.access("/proc/self/clear_refs", os.W_OK)):
        return None
    line = next((row for row in status.read_text().splitlines() if row.startswith(field)), None)
    return None if line is None else int(line.split()[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], sys.argv[4])))
