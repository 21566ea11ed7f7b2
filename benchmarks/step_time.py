"""Time of an optimizer step as a ratio to ``torch.optim.AdamW(fused=True)``, in CPU seconds.

    python benchmarks/step_time.py [--size 124m|3m|...] [--threads N] [--rounds N] [--json FILE]

Every method is timed between two AdamW steps (A B A) in one process, and the ratio of a round is B over the
mean of the two A: a machine that slows down slows both. The control is AdamW against a second AdamW.
Gradients are set once; only ``step()`` is timed, without refreshes (see refresh_cost.py). Limit by words
moved: 6 to 7, 0.857.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from sophia import Sophia


def shapes(size: str) -> list[tuple[int, ...]]:
    """Shapes of a GPT-2: (layers, width, vocabulary, context) by name, or one flat tensor of n million."""
    table = {"124m": (12, 768, 50257, 1024), "3m": (12, 128, 4096, 256), "30m": (6, 384, 50257, 1024)}
    if size not in table:
        return [(int(float(size.removesuffix("m")) * 1e6),)]
    layers, d, vocabulary, context = table[size]
    block = [
        (d,),
        (d,),
        (3 * d, d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (4 * d, d),
        (4 * d,),
        (d, 4 * d),
        (d,),
    ]
    return [(vocabulary, d), (context, d), *(block * layers), (d,), (d,)]


def parameters(size: str) -> list[torch.nn.Parameter]:
    """Random parameters with random gradients."""
    made = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes(size)]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def sophia(size: str, **settings: object) -> torch.optim.Optimizer:
    """Sophia with an h of many orders of magnitude, so that some coordinates are clipped and some are not."""
    opt = Sophia(parameters(size), mode="manual", update_every=2**30, **settings)
    opt.step()
    for state in opt.state.values():
        state["hessian"].copy_(torch.randn_like(state["hessian"]).mul_(3).exp_().mul_(1e-3))
    return opt


METHODS = {
    "adamw fused (control)": lambda size: torch.optim.AdamW(parameters(size), fused=True),
    "sophia, default": lambda size: sophia(size),
    "sophia, foreach": lambda size: sophia(size, foreach=True),
    "sophia, tensor by tensor": lambda size: sophia(size, foreach=False),
    "adamw foreach": lambda size: torch.optim.AdamW(parameters(size), foreach=True),
    "adamw for-loop": lambda size: torch.optim.AdamW(parameters(size), foreach=False, fused=False),
}


def cpu_seconds(opt: torch.optim.Optimizer) -> float:
    """Processor time of one step, all threads together."""
    start = time.process_time()
    opt.step()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="3m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reference = torch.optim.AdamW(parameters(options.size), fused=True)
    cpu_seconds(reference)
    rows = {}
    for name, make in METHODS.items():
        opt = make(options.size)
        cpu_seconds(opt)
        ratios = []
        for _ in range(options.rounds):
            before, own, after = cpu_seconds(reference), cpu_seconds(opt), cpu_seconds(reference)
            ratios.append(2 * own / (before + after))
        del opt
        low, *_, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"ratio": statistics.median(ratios), "quartiles": [low, high]}
        print(f"{name:26s} {statistics.median(ratios):6.3f}   ({low:.3f} to {high:.3f})", flush=True)
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        record = {
            "size": options.size,
            "parameters": sum(p.numel() for g in reference.param_groups for p in g["params"]),
            "threads": options.threads,
            "rounds": options.rounds,
            "unit": "CPU seconds of a step over those of AdamW(fused=True), median of A B A rounds",
            "torch": torch.__version__,
            "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit.stdout.strip(),
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
