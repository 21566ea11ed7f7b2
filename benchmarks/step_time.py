"""Time of an optimizer step as a ratio to ``torch.optim.AdamW(fused=True)``, in CPU seconds.

    python benchmarks/step_time.py [--size 124m|3m|...] [--threads N] [--rounds N] [--only WORD] [--json FILE]

Every method is timed between two AdamW steps (A B A) in one process, and the ratio of a round is B over the
mean of the two A: a machine that slows down slows both. The control is AdamW against a second AdamW.
Gradients are set once; only ``step()`` is timed, without refreshes (see refresh_cost.py). Limit by words
moved: 6 to 7, 0.857; with bfloat16 m and h 18 bytes to 28, 0.643.

With several threads those of OpenMP are told to sleep while they wait (see threads.py): else AdamW's seconds
are mostly waiting where the machine has other work.

The record also has the first step of a new process (from ``import sophia`` to its end, in seconds of the
clock), the nanoseconds a parameter, and the bytes of state a parameter.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import records
import torch
from threads import waiting_costs_nothing

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


def parameters(size: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Random parameters with random gradients."""
    made = [torch.nn.Parameter((torch.randn(s) * 0.02).to(dtype)) for s in shapes(size)]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def sophia(size: str, dtype: torch.dtype = torch.float32, **settings: object) -> torch.optim.Optimizer:
    """Sophia with an h of many orders of magnitude, so that some coordinates are clipped and some are not."""
    made = torch.nn.ParameterList(parameters(size, dtype))
    opt = Sophia(made, mode="manual", update_every=2**30, **settings)
    opt.step()
    spread_curvature(opt)
    return opt


def spread_curvature(opt: torch.optim.Optimizer) -> None:
    """Set every h there is to noise of many orders of magnitude."""
    for state in opt.state.values():
        if "hessian" in state:
            noise = torch.randn_like(state["hessian"], dtype=torch.float32)
            state["hessian"].copy_(noise.mul_(3).exp_().mul_(1e-3))


BF16 = torch.bfloat16
METHODS = {
    "adamw fused (control)": lambda size: torch.optim.AdamW(parameters(size), fused=True),
    "sophia, default": lambda size: sophia(size),
    "sophia, rule damped": lambda size: sophia(size, rule="damped"),
    "sophia, bfloat16 m and h": lambda size: sophia(size, state_dtype=BF16),
    "sophia, bfloat16 parameters": lambda size: sophia(size, BF16),
    "sophia, bfloat16 parameters, m and h": lambda size: sophia(
        size, BF16, state_dtype=BF16, stochastic_rounding=True
    ),
    "sophia, float16 parameters": lambda size: sophia(size, torch.float16),
    "sophia, foreach": lambda size: sophia(size, foreach=True),
    "sophia, rule damped, foreach": lambda size: sophia(size, rule="damped", foreach=True),
    "sophia, foreach, bfloat16 m and h": lambda size: sophia(size, foreach=True, state_dtype=BF16),
    "sophia, tensor by tensor": lambda size: sophia(size, foreach=False),
    "adamw foreach": lambda size: torch.optim.AdamW(parameters(size), foreach=True),
    "adamw for-loop": lambda size: torch.optim.AdamW(parameters(size), foreach=False, fused=False),
}


def cpu_seconds(opt: torch.optim.Optimizer) -> float:
    """Processor time of one step, all threads together."""
    start = time.process_time()
    opt.step()
    return time.process_time() - start


COLD = """
import time
start = time.perf_counter()
import torch
loaded = time.perf_counter()
from sophia import Sophia
p = torch.nn.Parameter(torch.randn(1000, 1000))
p.grad = torch.randn(1000, 1000)
Sophia([p], mode="manual").step()
print(time.perf_counter() - loaded)
"""


def first_step() -> float:
    """Seconds from ``import sophia`` to the end of the first step, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 3)


def state_bytes(opt: torch.optim.Optimizer) -> float:
    """Bytes of state a parameter, but for single numbers (AdamW's step counts)."""
    kept = [t for s in opt.state.values() for t in s.values() if t.numel() > 1]
    count = sum(p.numel() for g in opt.param_groups for p in g["params"])
    return round(sum(t.numel() * t.element_size() for t in kept) / count, 4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="3m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="methods whose name contains one of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    waiting_costs_nothing(options.threads)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reference = torch.optim.AdamW(parameters(options.size), fused=True)
    cpu_seconds(reference)
    count = sum(p.numel() for g in reference.param_groups for p in g["params"])
    rows = {}
    for name, make in METHODS.items():
        if not any(word in name for word in options.only):
            continue
        opt = make(options.size)
        cpu_seconds(opt)
        ratios, own_times = [], []
        before = cpu_seconds(reference)
        # Strictly turn about: a step of the reference after one of its own would find the cache its own.
        for _ in range(options.rounds):
            own, after = cpu_seconds(opt), cpu_seconds(reference)
            ratios.append(2 * own / (before + after))
            own_times.append(own)
            before = after
        low, *_, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "ns_per_parameter": round(statistics.median(own_times) / count * 1e9, 4),
            "state_bytes_per_parameter": state_bytes(opt),
        }
        del opt
        print(f"{name:38s} {statistics.median(ratios):6.3f}   ({low:.3f} to {high:.3f})", flush=True)
    if options.json:
        records.write(
            options.json,
            threads=options.threads,
            size=options.size,
            parameters=count,
            rounds=options.rounds,
            unit="CPU seconds of a step over those of AdamW(fused=True), median of A B A rounds",
            first_step_seconds=first_step(),
            rows=rows,
        )


if __name__ == "__main__":
    main()
