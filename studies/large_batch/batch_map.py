"""Where, over batch sizes, does the published rule win? End losses by batch, rate and gamma, beside AdamW's.

    python studies/large_batch/batch_map.py OUT.jsonl [--batches 16 64 256 1024 2048]
            [--steps 60] [--threads 1] [--seeds 2 3 4 5]

GPT-2 of 2 layers and width 32 (0.17M parameters, four fifths of them the token table), 64 tokens of context,
each batch with its own full cosine schedule. Rules: AdamW and the published rule (Sophia-G, refreshed each
fifth step), each with one rate for all tensors and with two in a fixed proportion, and a control that draws
no labels: the published rule with squares of the training gradient. Rates are searched at each batch alike,
on one seed: begin where the batch before ended, double, then go on away from the worse until the best has a
worse one on both sides, five at most. That is a map, not a verdict; with ``--seeds`` the best rate of each
rule with two rates is run on seeds that chose nothing.

A line a run: end loss on held-out text, the share of coordinates that were not clipped, and the gradient's
noise scale tr(Sigma) / |G|^2 in tokens (McCandlish et al., arXiv 1812.06162, appendix A.1) at a quarter, half
and the end. What is in the file is not made again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rest_of_the_model import hidden_names
from torch import Tensor, nn
from tqdm import tqdm

from sophia import Sophia
from sophia.lab.config import schedules
from sophia.lab.config.run import Model, Schedule
from sophia.lab.data import corpus, tokens
from sophia.lab.data.tokens import Tokens
from sophia.lab.models import build
from sophia.lab.optimizers.contender import matrices_decayed
from sophia.lab.support import provenance
from sophia.lab.support.allocator import keep_freed_memory
from sophia.lab.support.json_lines import append_line, whole_lines

MODEL = Model(layers=2, width=32, heads=2, context=64)
MICRO = 16
"""Sequences of a micro-batch."""
SEED = 1
HELD_OUT = 512
"""Sequences."""
MOST = 5
"""Rates at one batch."""


class Rule(NamedTuple):
    """A line of the map."""

    name: str
    published: bool
    gamma: float
    apart: bool
    """Whether hidden matrices have a rate of their own: AdamW a fortieth, as its searches chose, the
    published rule a tenth beside four times the rest's, the proportion of the damped rule.
    """
    first: float
    """The rate to begin with at the smallest batch."""
    estimator: str = "gnb"

    @property
    def scales(self) -> tuple[float, float]:
        """Of hidden matrices and of the rest."""
        return ((0.1, 4.0) if self.published else (1 / 40, 1.0)) if self.apart else (1.0, 1.0)


RULES = (
    Rule("adamw", False, 0.0, False, 0.004),
    Rule("adamw-apart", False, 0.0, True, 0.02),
    Rule("sophia-g", True, 0.05, False, 0.001),
    Rule("sophia-g", True, 0.5, False, 0.002),
    Rule("sophia-g-apart", True, 0.05, True, 0.002),
    Rule("sophia-g-apart", True, 0.5, True, 0.002),
    Rule("sophia-fisher-apart", True, 0.5, True, 0.008, "empirical_fisher"),
)


def optimizer(rule: Rule, model: nn.Module, lr: float, seed: int = SEED) -> torch.optim.Optimizer:
    """With the decay of matrices alone; groups have their own rate."""
    hidden = hidden_names(model)
    groups = []
    for scale, mine in zip(rule.scales, (True, False), strict=True):
        parts = matrices_decayed(
            model, {"weight_decay": 0.1}, only=lambda name, mine=mine: (name in hidden) is mine
        )
        groups += [{**group, "lr": lr * scale} for group in parts]
    if not rule.published:
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    # Twelve refreshes in sixty steps: by the paper's 0.99 h would be at a tenth of its size.
    return Sophia(
        groups,
        model=model,
        betas=(0.9, 0.8),
        gamma=rule.gamma,
        update_every=5,
        fraction=1 / 8,
        seed=seed,
        estimator=rule.estimator,
    )


def noise_scale(squares: list[float], whole: float) -> float | None:
    """tr(Sigma) / |G|^2 in tokens, from |g|^2 of each micro-batch and of their mean; None where the
    estimate of |G|^2 is lost in noise.
    """
    n, small = len(squares), MICRO * MODEL.context
    mean = math.fsum(squares) / n
    signal = (n * whole - mean) / (n - 1)
    noise = (mean - whole) / (1 / small - 1 / (n * small))
    return noise / signal if signal > 0 else None


def gradients(model: nn.Module, batch: Tensor) -> tuple[list[float], float]:
    """Put the mean gradient into ``.grad``; |g|^2 of each micro-batch, and of the mean."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    pieces = batch.split(MICRO)
    squares, total = [], [torch.zeros_like(p) for p in parameters]
    for piece in pieces:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=piece, labels=piece).loss / len(pieces)
        loss.backward()
        found = [p.grad - t for p, t in zip(parameters, total, strict=True)]
        squares.append(len(pieces) ** 2 * sum(float(g.square().sum()) for g in found))
        torch._foreach_copy_(total, [p.grad for p in parameters])
    return squares, sum(float(g.square().sum()) for g in total)


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Tensor) -> float:
    """In float32."""
    model.eval()
    total = sum(float(model(input_ids=x, labels=x).loss) * len(x) for x in held_out.split(64))
    model.train()
    return total / len(held_out)


def trained(rule: Rule, lr: float, batch: int, steps: int, text: Tokens, seed: int = SEED) -> dict[str, Any]:
    """One run."""
    model = build.build(MODEL, seed=seed)
    model.set_attn_implementation("eager")
    opt = optimizer(rule, model, lr, seed)
    peaks = [group["lr"] for group in opt.param_groups]
    schedule = Schedule(warmup=max(1, steps // 10))
    shares, scales = [], {}
    for step in tqdm(range(steps), leave=False, desc=f"{rule.name} {rule.gamma or ''} {batch} {lr:.3g}"):
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            group["lr"] = peak * schedules.factor(schedule, step, steps=steps)
        ids = text.batch(seed=seed, step=step, size=batch, context=MODEL.context)
        squares, whole = gradients(model, ids)
        if not math.isfinite(whole):
            return {"status": "diverged", "loss": None}
        if len(squares) > 1 and step in (steps // 4, steps // 2, steps - 1):
            scales[step] = noise_scale(squares, whole)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if rule.published:
            shares.append(opt.stats()["unclipped"])
    held_out, _ = text.held_out(sequences=HELD_OUT, context=MODEL.context)
    return {
        "status": "finished",
        "loss": held_out_loss(model, held_out),
        "unclipped": math.fsum(shares) / len(shares) if shares else None,
        "noise_scale": scales,
    }


def rates(first: float, ends: Mapping[float, float]) -> Iterator[float]:
    """What to try next, given the end losses so far (infinite where a run diverged), until the best has a
    worse one on both sides.

    >>> list(rates(0.01, {})), list(rates(0.01, {0.01: 3.0})), list(rates(0.01, {0.01: 3.0, 0.02: 3.1}))
    ([0.01], [0.02], [0.005])
    >>> list(rates(0.01, {0.005: 3.2, 0.01: 3.0, 0.02: 3.1}))
    []
    """
    if not ends:
        yield first
        return
    best = min(ends, key=lambda lr: ends[lr])
    for factor in (2.0, 0.5):
        if not any(math.isclose(lr, best * factor) for lr in ends):
            yield best * factor
            return


def main() -> None:
    """All runs that the file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024, 2048])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    text = tokens.encode(corpus.load("sotu"))
    here = provenance.describe(threads=given.threads, device="cpu")
    done = {row["key"]: row["loss"] for row in whole_lines(given.out)}

    def end(rule: Rule, lr: float, batch: int, seed: int = SEED) -> float:
        """The loss of a run, made unless the file has it; infinite if it diverged."""
        key = f"{rule.name}, gamma {rule.gamma}, {batch} sequences, {given.steps} steps, lr {lr:.6g}"
        key += "" if seed == SEED else f", seed {seed}"
        if key not in done:
            result = trained(rule, lr, batch, given.steps, text, seed)
            case = {**rule._asdict(), "lr": lr, "batch": batch, "steps": given.steps, "seed": seed}
            append_line(given.out, {"key": key, **case, **result, "environment": here})
            done[key] = result["loss"]
        loss = done[key]
        return math.inf if loss is None else float(loss)

    for rule in RULES:
        first = rule.first
        for batch in given.batches:
            ends: dict[float, float] = {}
            while len(ends) < MOST and (lr := next(rates(first, ends), None)) is not None:
                ends[lr] = end(rule, lr, batch)
            first = min(ends, key=lambda lr: ends[lr])
            for seed in given.seeds if rule.apart else ():
                end(rule, first, batch, seed)


if __name__ == "__main__":
    main()
