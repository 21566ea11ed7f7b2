"""A folder of records as `sophia compare` would leave it, from known curves: the truth is planted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY_LOSS = 8.3


def end_loss(steps: float) -> float:
    """The planted baseline curve, nats: a D^-b + c."""
    return 3.6 + 1.25 * (steps / 300) ** -0.45


@dataclass(frozen=True)
class Planted:
    """One comparison's truth."""

    efficiency: Mapping[str, float] = field(default_factory=lambda: {"adamw": 1.0, "sophia-g": 0.8})
    """Share of a contender's steps that count; the baseline first."""
    extra_passes: Mapping[str, float] = field(default_factory=lambda: {"sophia-g": 0.05, "sophia-h": 0.2})
    """Gradient evaluations a step beyond one."""
    seeds: Sequence[int] = (0, 1)
    budgets: Sequence[int] = (300, 600)
    rest: float = 0.008
    shared: float = 0.012
    common: float = 0.0
    """Correlation of `rest` between the budgets of one contender and seed, as runs with one trunk have it."""
    wsd: bool = False
    """Whether the records say that budgets share their trunk, as records of older releases do."""
    h: bool = True
    """Whether Sophia's rows say how its curvature is distributed."""
    diverged: frozenset[tuple[str, int, int]] = frozenset()
    missing: frozenset[tuple[str, int, int]] = frozenset()
    unfinished: frozenset[tuple[str, int, int]] = frozenset()


def planted_ends(planted: Planted, rng: np.random.Generator) -> dict[tuple[str, int, int], float]:
    """End losses with noise: what a seed does to all (correlated between budgets), and what it does to
    one.
    """
    ends = {}
    for seed in planted.seeds:
        common = rng.normal()
        trunk = {name: rng.normal() for name in planted.efficiency} if planted.common else {}
        for budget in planted.budgets:
            shared = planted.shared * (common + rng.normal()) / np.sqrt(2)
            for name, share in planted.efficiency.items():
                own = rng.normal()
                if trunk:
                    own = np.sqrt(planted.common) * trunk[name] + np.sqrt(1 - planted.common) * own
                ends[name, budget, seed] = float(end_loss(share * budget) + shared + planted.rest * own)
    return ends


def write_comparison(folder: Path, planted: Planted | None = None, *, seed: int = 0, **extra: Any) -> Path:
    """Write comparison.json and every run's records under `folder`; `extra` goes into comparison.json."""
    planted = planted or Planted()
    rng = np.random.default_rng(seed)
    ends = planted_ends(planted, rng)
    listed = []
    for (name, budget, run_seed), loss in ends.items():
        key = (name, budget, run_seed)
        run = run_name(key)
        listed.append({"contender": name, "seed": run_seed, "steps": budget, "run": run})
        if key not in planted.missing:
            _write_run(folder / "runs" / run, key, loss, planted, rng)
    comparison = {
        "version": 1,
        "preset": "quick",
        "contenders": list(planted.efficiency),
        "seeds": list(planted.seeds),
        "budgets": list(planted.budgets),
        "baseline": next(iter(planted.efficiency)),
        "data": {"name": "sotu", "train_tokens": 2_650_000, "validation_tokens": 96_000, "vocabulary": 4096},
        "runs": listed,
    }
    (folder / "comparison.json").write_text(json.dumps(comparison | extra))
    return folder


def run_name(key: tuple[str, int, int]) -> str:
    """The folder of a run."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _trunk(key: tuple[str, int, int], planted: Planted, second: float) -> dict[str, Any]:
    """What a budget below the largest has from the largest one's run: its first four fifths."""
    name, budget, seed = key
    if not planted.wsd or budget == max(planted.budgets):
        return {}
    steps = budget * 4 // 5
    trunk = run_name((name, max(planted.budgets), seed))
    seconds = {"seconds": steps * second, "cpu_seconds": steps * second * 1.9}
    return {"trunk": {"run": trunk, "steps": steps, **seconds}}


def _write_run(
    folder: Path, key: tuple[str, int, int], loss: float, planted: Planted, rng: np.random.Generator
) -> None:
    name, budget, seed = key
    folder.mkdir(parents=True)
    sophia = name.startswith("sophia")
    optimizer: dict[str, Any] = {"name": name, "lr": 1e-3 if sophia else 3e-3, "weight_decay": 0.1}
    optimizer |= (
        {"gamma": 0.05, "update_every": 10, "betas": [0.8, 0.99]} if sophia else {"betas": [0.9, 0.95]}
    )
    config = {
        "optimizer": optimizer,
        "seed": seed,
        "steps": budget,
        "batch": {"sequences": 8, "length": 128},
        "model": {"layers": 4, "width": 128, "heads": 4, "parameters": 1_320_000},
        "schedule": {"kind": "wsd" if planted.wsd else "cosine", "warmup": 30, "final": 0.1},
        "clip_grad_norm": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "attempts.jsonl").write_text('{"from_step": 0}\n')
    passes = 1 + planted.extra_passes.get(name, 0.0)
    second = 0.085 * (1 + 1.2 * (passes - 1)) * (1 + 0.03 * rng.normal())
    stop = budget
    if key in planted.unfinished or key in planted.diverged:
        stop = budget // 2
    with (folder / "log.jsonl").open("w") as log:
        for step in range(0, stop + 1, 5):
            progress = step / budget
            clean = (
                loss
                + (VOCABULARY_LOSS - loss) * np.exp(-14 * progress)
                + 0.45 * (1 - progress) * (progress > 0)
            )
            if key in planted.diverged and progress > 0.4:
                clean += 40 * (progress - 0.4)
            lr = optimizer["lr"] * min(1.0, step / 30) * (0.55 + 0.45 * np.cos(np.pi * progress))
            common = {
                "step": step,
                "tokens": step * 1024,
                "gradient_evaluations": step * passes,
                "seconds": step * second,
                "cpu_seconds": step * second * 1.9,
            }
            if step:
                row: dict[str, Any] = {
                    "kind": "train",
                    "loss": clean + 0.05 * rng.normal(),
                    "lr": lr,
                    "grad_norm": 0.4 + 2 * np.exp(-9 * progress) + 0.05 * abs(rng.normal()),
                }
                if sophia:
                    row["unclipped"] = float(
                        np.clip(0.55 - 0.4 * np.exp(-4 * progress) + 0.02 * rng.normal(), 0, 1)
                    )
                    if planted.h:
                        row["eps_limited"] = float(0.6 * np.exp(-6 * progress))
                        for name_of, decade in (("h_q05", -9), ("h_q50", -6), ("h_q95", -3)):
                            row[name_of] = float(10 ** (decade + progress + 0.1 * rng.normal()))
                log.write(json.dumps(row | common) + "\n")
            if step % 30 == 0:
                evaluation = {"kind": "eval", "loss": clean, "bits_per_byte": clean / 2.77}
                log.write(json.dumps(evaluation | common) + "\n")
    if key in planted.unfinished:
        return
    diverged = key in planted.diverged
    result = {
        "status": "diverged" if diverged else "finished",
        "loss": None if diverged else loss,
        "bits_per_byte": None if diverged else loss / 2.77,
        "steps": stop,
        "tokens": stop * 1024,
        "gradient_evaluations": stop * passes,
        "flops": stop * passes * 6 * 1_320_000 * 1024,
        "seconds": stop * second,
        "cpu_seconds": stop * second * 1.9,
        "parameters": 1_320_000,
        "state_bytes": 2 * 4 * 1_320_000,
        "unclipped": 0.52 if sophia else None,
        **_trunk(key, planted, second),
        "environment": {
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "machine": "x86_64, 2 cores",
            "commit": "80877bf",
        },
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
