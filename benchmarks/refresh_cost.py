"""What Sophia adds to a whole training step, as a ratio to ``AdamW(fused=True)``, in CPU seconds.

    python benchmarks/refresh_cost.py [--size small|wide] [--threads N] [--rounds N] [--json FILE]

One model trains with AdamW and one with Sophia, on one batch, in one process, turn about; every second step
of Sophia renews h. A whole training step strays by more than what is to be found, so its parts are timed:

    ratio = 1 + ( S - A + (R + L) / k ) / (F + A),      k = 10,

F forward, backward and clipping with AdamW; A its step; S a step of Sophia without a refresh; R what a
refresh adds to it; L the hooks that watch the forward and backward before a refresh; medians over the rounds.
Forward, backward and clipping are taken to cost both the same; "whole" is the ratio without that, of the
times of whole steps, and the control that of AdamW against itself: how far it may stray.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gpt
import records
import torch
from threads import waiting_costs_nothing
from torch.nn import functional as F

from sophia import Sophia
from sophia.refresh import arrivals, hook, other_outputs, recorder

K = 10
FRACTIONS = {"1/8": 1 / 8, "1/2": 1 / 2, "1/16": 1 / 16, "1": 1.0}


class Listening:
    """Adds up the time in the hooks that record a forward and read its gradients."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for kind in (hook.Hook, recorder._Listener, other_outputs._Listener, arrivals._Arrival):
            kind.__call__ = self._timed(kind.__call__)

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: object) -> None:
            start = time.process_time()
            call(*arguments)
            self.seconds += time.process_time() - start

        return timed


class Trainer:
    """One model and its optimizer; ``train()`` takes a step and gives the seconds of gradient and step."""

    def __init__(self, size: str, make: Callable[[torch.nn.Module], torch.optim.Optimizer]) -> None:
        self.model, self.x, self.y = gpt.make(size)
        self.optimizer = make(self.model)
        self.train(), self.train()

    def train(self) -> tuple[float, float]:
        """One training step."""
        start = time.process_time()
        F.cross_entropy(self.model(self.x).flatten(0, 1), self.y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        middle = time.process_time()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return middle - start, time.process_time() - middle


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The reference."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def compare(own: Trainer, reference: Trainer, listening: Listening, rounds: int) -> dict[str, object]:
    """A row of the record: the parts in milliseconds, and the ratios."""
    parts: dict[str, list[float]] = {name: [] for name in ("F", "A", "S", "R", "L", "plain", "due", "whole")}
    for _ in range(rounds):
        for due in (True, False):
            gradient, step = reference.train()
            before = listening.seconds
            own_gradient, own_step = own.train()
            parts["F"].append(gradient)
            parts["A"].append(step)
            parts["whole"].append(gradient + step)
            parts["R" if due else "S"].append(own_step)
            parts["due" if due else "plain"].append(own_gradient + own_step)
            if due:
                parts["L"].append(listening.seconds - before)
    t = {name: statistics.median(times) for name, times in parts.items()}
    # Quartiles of what a refresh costs: the rest is the same in each round.
    low, _, high = statistics.quantiles(parts["R"], n=4, method="inclusive")

    def ratio(refreshing: float) -> float:
        return 1 + (t["S"] - t["A"] + (refreshing - t["S"] + t["L"]) / K) / (t["F"] + t["A"])

    return {
        "ratio": round(ratio(t["R"]), 5),
        "quartiles": [round(ratio(low), 5), round(ratio(high), 5)],
        "whole": round(((K - 1) * t["plain"] + t["due"]) / (K * t["whole"]), 4),
        "milliseconds": {
            "gradient and clipping (F)": round(t["F"] * 1e3, 2),
            "AdamW's step (A)": round(t["A"] * 1e3, 3),
            "step (S)": round(t["S"] * 1e3, 3),
            "refresh (R)": round((t["R"] - t["S"]) * 1e3, 2),
            "hooks before it (L)": round(t["L"] * 1e3, 3),
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(gpt.SIZES), default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fractions", nargs="*", choices=sorted(FRACTIONS), default=["1/8", "1/2", "1/16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    waiting_costs_nothing(options.threads)
    torch.set_num_threads(options.threads)
    listening = Listening()
    reference = Trainer(options.size, adamw)
    control = Trainer(options.size, adamw)
    rows: dict[str, dict[str, object]] = {}
    for name in ("control", *options.fractions):
        own = control
        if name != "control":
            fraction = FRACTIONS[name]
            own = Trainer(
                options.size, lambda model, f=fraction: Sophia(model, lr=1e-4, update_every=2, fraction=f)
            )
        rows[name] = compare(own, reference, listening, options.rounds)
        print(f"{name:8s} {json.dumps(rows[name])}", flush=True)
    records.write(
        options.json,
        threads=options.threads,
        size=options.size,
        shape=gpt.SIZES[options.size],
        rounds=options.rounds,
        unit="CPU seconds of a training step with k = 10 over those of AdamW(fused=True); rows are fractions "
        "of the batch that a refresh takes",
        rows=rows,
    )


if __name__ == "__main__":
    main()
