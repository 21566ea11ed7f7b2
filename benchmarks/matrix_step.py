"""Time of a step of the rules for matrices as a ratio to ``torch.optim.Muon``, in CPU seconds.

    python benchmarks/matrix_step.py [--width 256] [--layers 12] [--threads N] [--rounds N] [--json FILE]

The hidden matrices of a GPT-2 of that width alone, the same for all. A round is five steps, since the
whitened rule decomposes in every fifth, between five of Muon's and five of Muon's (A B A): B over the mean of
the two A. The control is a second Muon. Gradients are set once, of noise that is larger in some columns.
"""

import argparse
import statistics
import time
from pathlib import Path

import records
import torch
from step_time import state_bytes
from torch import nn

from sophia import Sophia
from sophia.step.polar import multiplies_bfloat16

STEPS = 5


def matrices(width: int, layers: int) -> nn.ParameterList:
    """Random matrices with random gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    made = nn.ParameterList(torch.randn(s, generator=generator) * 0.02 for s in shapes)
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator) * torch.logspace(-4, -2, p.size(1))
    return made


def ours(rule: str, made: nn.ParameterList) -> Sophia:
    """The step of hidden matrices, all of them by hand: without a head the last would be one."""
    return Sophia([{"params": list(made), "rule": rule, "scale": 0.2}], lr=1e-3, mode="manual")


METHODS = {
    "torch muon (control)": lambda made: torch.optim.Muon(made),
    "spectral": lambda made: ours("spectral", made),
    "whitened": lambda made: ours("whitened", made),
    "factored": lambda made: ours("factored", made),
}


def cpu_seconds(opt: torch.optim.Optimizer) -> float:
    """Processor time of five steps, all threads together."""
    start = time.process_time()
    for _ in range(STEPS):
        opt.step()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    reference = torch.optim.Muon(matrices(given.width, given.layers))
    cpu_seconds(reference)
    rows = {}
    for name, make in METHODS.items():
        opt = make(matrices(given.width, given.layers))
        cpu_seconds(opt)
        ratios, before = [], cpu_seconds(reference)
        for _ in range(given.rounds):
            own, after = cpu_seconds(opt), cpu_seconds(reference)
            ratios.append(2 * own / (before + after))
            before = after
        low, *_, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "state_bytes_per_parameter": state_bytes(opt),
        }
        print(f"{name:24s} {statistics.median(ratios):6.3f}   ({low:.3f} to {high:.3f})", flush=True)
    records.write(
        given.json,
        threads=given.threads,
        width=given.width,
        layers=given.layers,
        rounds=given.rounds,
        bfloat16=multiplies_bfloat16(torch.device("cpu")),
        unit="CPU seconds of five steps over those of torch.optim.Muon, median of A B A rounds",
        rows=rows,
    )


if __name__ == "__main__":
    main()
