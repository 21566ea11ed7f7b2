"""Peak memory of training with Sophia against AdamW, and whether it stays flat.

    python benchmarks/peak_memory.py [--size small|wide] [--json FILE]

Each optimizer trains in a process of its own: 3 steps of warm-up, then the high-water mark of resident memory
is reset and read again after 12 steps (with a refresh on two of them), then 30 more steps for flatness.
Linux only (/proc/self/clear_refs). Numbers are MiB above the process before the model was made. glibc is told
to give freed tensors back at once: what it keeps otherwise wanders by 16 MiB, and is not the optimizer's.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpt
import records
import torch
from torch.nn import functional as F

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "adamw": None,
    "sophia, fraction 1": {"fraction": 1.0},
    "sophia, fraction 1/2": {"fraction": 0.5},
    "sophia, fraction 1/4": {"fraction": 0.25},
    "sophia, fraction 1/8": {"fraction": 0.125},
    "spectral": {"rule": "spectral"},
}

GIVES_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def status(key: str) -> float:
    """A field of /proc/self/status, in MiB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) / 1024


def measure(name: str, size: str) -> dict[str, float]:
    """Train in this process; return peak and growth."""
    from sophia import Sophia

    torch.set_num_threads(1)
    before = status("VmRSS")
    model, x, y = gpt.make(size)
    settings = CONTENDERS[name]
    if settings is None:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        opt = Sophia(model, lr=1e-4, **settings)

    def train(steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            opt.step()

    train(3)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    train(12)
    peak = status("VmHWM")
    train(5)
    settled = status("VmHWM")
    train(25)
    return {
        "peak_mib": round(peak - before, 1),
        "growth_over_25_steps_mib": round(status("VmHWM") - settled, 1),
        "state_bytes_per_parameter": sum(
            t.numel() * t.element_size() for s in opt.state.values() for t in s.values() if t.numel() > 1
        )
        / sum(p.numel() for p in model.parameters() if p.numel() > 1),
    }


def main() -> None:
    """Run all contenders and print ratios to AdamW."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(gpt.SIZES), default="small")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=sorted(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.size)))
        return
    rows = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--size", options.size, "--only", name]
        ended = subprocess.run(command, env=GIVES_BACK, capture_output=True, text=True, check=True)
        rows[name] = json.loads(ended.stdout)
        rows[name]["peak_over_adamw"] = round(rows[name]["peak_mib"] / rows["adamw"]["peak_mib"], 3)
        print(f"{name:22s} {rows[name]}", flush=True)
    records.write(options.json, threads=1, size=options.size, shape=gpt.SIZES[options.size], rows=rows)


if __name__ == "__main__":
    main()
