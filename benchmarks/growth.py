"""How the cost of a step grows with the model, and of a refresh with the steps that went before.

    python benchmarks/growth.py [--sizes 1 4 16 64 250 500] [--rounds N] [--json FILE]

The step: nanoseconds of processor time a parameter, for Sophia and for ``AdamW(fused=True)``, at each size in
millions of parameters, one thread. All sizes are parts of the same four arrays and take turns. Before every
step the caches are filled with something else, as a forward and backward would do (the 16 MB of 1M
parameters would else come out of the cache), and a step of 1000 parameters brings the program itself back.
What that one costs, with the program out of the cache, is told apart: it is the same at any size. 500M
parameters need 8 GB.

The refresh: one small model has trained 3000 steps, another 30; steps with a refresh of both, turn about.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import gpt
import records
import torch
from torch.nn import functional as F

from sophia import Sophia

SMALL = 1000


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """Processor time of one step."""
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def steps(sizes: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds a parameter by size."""
    most = max(sizes)
    theta, g = torch.empty(most).normal_(std=0.02), torch.empty(most).normal_(std=1e-3)
    m, h = torch.zeros(most), torch.empty(most).uniform_(0, 0.1)
    other = torch.zeros(2**25)  # 128 MB
    optimizers = {}
    for size in [SMALL, *sizes]:
        p = torch.nn.Parameter(theta[:size])
        p.grad = g[:size]
        ours = Sophia([p], mode="manual", update_every=2**40)
        ours.state[p] = {"exp_avg": m[:size], "hessian": h[:size]}
        adamw = torch.optim.AdamW([p], fused=True)
        adamw.state[p] = {"step": torch.tensor(10.0), "exp_avg": m[:size], "exp_avg_sq": h[:size]}
        optimizers[size] = {"sophia": ours, "adamw": adamw}
    found = {size: {name: [] for name in own} for size, own in optimizers.items()}
    for number in range(-1, rounds):
        for size in sizes:
            for name, optimizer in optimizers[size].items():
                for _ in range(max(1, min(8, 2**25 // size))):
                    other.add_(1.0)
                    cold, spent = seconds(optimizers[SMALL][name]), seconds(optimizer)
                    if number >= 0:
                        found[SMALL][name].append(cold * 1e6)
                        found[size][name].append(spent / size * 1e9)
    fixed = {name: round(statistics.median(times), 1) for name, times in found.pop(SMALL).items()}
    print(f"1000 parameters, all out of the cache: {fixed} microseconds")
    rows = {}
    for size, times in found.items():
        ours, theirs = (statistics.median(times[name]) for name in ("sophia", "adamw"))
        rows[f"{size / 1e6:g}M"] = {
            "ns_per_parameter": round(ours, 4),
            "adamw_ns_per_parameter": round(theirs, 4),
            "ratio": round(ours / theirs, 4),
        }
        print(f"{size / 1e6:6g}M  {json.dumps(rows[f'{size / 1e6:g}M'])}", flush=True)
    return {"microseconds_of_1000_parameters_cold": fixed, **rows}


class Trainer:
    """A small model that refreshes at every second step."""

    def __init__(self) -> None:
        self.model = gpt.GPT(layers=2, width=64, heads=2, vocabulary=512, context=32)
        self.x, self.y = torch.randint(512, (2, 8, 32), generator=torch.Generator().manual_seed(1))
        self.optimizer = Sophia(self.model, lr=1e-4, update_every=2)

    def train(self) -> float:
        """One training step; returns the seconds of ``step()``."""
        F.cross_entropy(self.model(self.x).flatten(0, 1), self.y.flatten()).backward()
        spent = seconds(self.optimizer)
        self.optimizer.zero_grad()
        return spent


def refreshes(rounds: int) -> dict[str, float | int | list[float]]:
    """Time of a step with a refresh after many steps, over that after few."""
    old, young = Trainer(), Trainer()
    for _ in range(3000):
        old.train()
    for _ in range(30):
        young.train()
    over = []
    for _ in range(rounds):
        before, own = young.train(), old.train()  # with a refresh, both
        young.train(), old.train()  # without
        after = young.train()
        young.train()
        over.append(2 * own / (before + after))
    low, middle, high = statistics.quantiles(over, n=4)
    print(f"refresh after 3000 steps over after 30: {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)
    return {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "rounds": rounds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 4, 16, 64, 250, 500])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    refresh = refreshes(60)
    sizes = steps([int(size * 1e6) for size in options.sizes], options.rounds)
    each = [row["ns_per_parameter"] for row in sizes.values() if "ns_per_parameter" in row]
    records.write(
        options.json,
        threads=1,
        unit="CPU nanoseconds a parameter, medians; caches filled with something else before each step",
        rounds=options.rounds,
        refresh_after_3000_steps=refresh,
        sizes=sizes,
        largest_over_smallest=round(max(each) / min(each), 3),
    )


if __name__ == "__main__":
    main()
