"""What Sophia adds to a whole training step, as a ratio to ``AdamW(fused=True)``, in CPU seconds.

    python benchmarks/refresh_cost.py [--size small|wide] [--threads N] [--rounds N] [--json FILE]

Two copies of one model train on one batch in one process, turn about: k = 10 steps with AdamW, 10 steps with
Sophia, of which one refreshes. A round's ratio is the time of Sophia's ten over AdamW's ten: forward,
backward, clipping, step and refresh, at every fraction. The control is AdamW against a second AdamW.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import gpt
import torch
from torch.nn import functional as F

from sophia import Sophia

K = 10
METHODS = {
    "adamw fused (control)": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
    "sophia-g, fraction 1": lambda model: Sophia(model, lr=1e-4, fraction=1.0),
    "sophia-g, fraction 1/2": lambda model: Sophia(model, lr=1e-4, fraction=0.5),
    "sophia-g, fraction 1/4": lambda model: Sophia(model, lr=1e-4, fraction=0.25),
    "sophia-g, fraction 1/8": lambda model: Sophia(model, lr=1e-4, fraction=0.125),
}


class Trainer:
    """One model, one optimizer; ``ten()`` trains ten steps and returns their CPU seconds."""

    def __init__(self, size: str, make: object) -> None:
        self.model, self.x, self.y = gpt.make(size)
        self.opt = make(self.model)
        self.ten()

    def ten(self) -> float:
        """Ten steps."""
        start = time.process_time()
        for _ in range(K):
            F.cross_entropy(self.model(self.x).flatten(0, 1), self.y.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            self.opt.zero_grad()
        return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(gpt.SIZES), default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reference = Trainer(options.size, METHODS["adamw fused (control)"])
    rows = {}
    for name, make in METHODS.items():
        own = Trainer(options.size, make)
        ratios = [2 * own.ten() / (reference.ten() + reference.ten()) for _ in range(options.rounds)]
        rows[name] = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        print(f"{name:24s} {rows[name]['ratio']:.3f}   ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    if options.json:
        record = {
            "size": options.size,
            "shape": gpt.SIZES[options.size],
            "threads": options.threads,
            "rounds": options.rounds,
            "unit": "CPU seconds of ten training steps, one of them with a refresh, over those of "
            "AdamW(fused=True)",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
