"""The step alone beside ``AdamW(fused=True)``, at the shapes of two GPT-2: time, state, and memory of a step.

Five steps at a time, as rules that decompose do so in every fifth. Gradients are set once, h is noise of many
orders of magnitude, nothing is refreshed. The reference is made once a size; a method is made, measured and
deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_parts.scene import Scene, say, turn_about, with_gradients
from step_time import spread_curvature
from torch import nn

from sophia import Sophia
from sophia.lab.models.build import parameter_count
from sophia.lab.optimizers import table
from sophia.lab.optimizers.contender import state_bytes
from sophia.step.dispatch import kernels_of
from sophia.step.rules import RULES

STEPS, ROUNDS = 5, 11
SIZES = ("gpt2-125m", "gpt2-770m")
Make = Callable[[nn.Module], torch.optim.Optimizer]


def of_the_lab(name: str) -> Make:
    """A contender with its default settings."""
    row = table.find(name)
    return lambda model: row.build(model, row.settings({}), 1)


def ours(rule: str, **settings: Any) -> Make:
    """A rule without refreshes."""
    if RULES[rule].has_curvature:
        settings["update_every"] = 2**30

    def make(model: nn.Module) -> torch.optim.Optimizer:
        opt = Sophia(model, lr=1e-4, rule=rule, mode="manual", **settings)
        opt.step()
        spread_curvature(opt)
        return opt

    return make


METHODS: dict[str, Make] = {
    "adamw fused (control)": of_the_lab("adamw"),
    "paper": ours("paper"),
    "paper, one launch": ours("paper", fused=True),
    "paper, bfloat16 m and h": ours("paper", state_dtype=torch.bfloat16),
    "damped": ours("damped"),
    "spectral": ours("spectral"),
    "muon, adamw": of_the_lab("muon"),
    "whitened": ours("whitened"),  # last: it may take the time of all the others
}


def five(opt: torch.optim.Optimizer) -> Callable[[], None]:
    """What is timed."""

    def steps() -> None:
        for _ in range(STEPS):
            opt.step()

    return steps


def row_of(make: Make, reference: Callable[[], None], scene: Scene, size: str) -> dict[str, Any]:
    """One method at one size."""
    model = with_gradients(scene.model(size), scene.device)
    opt = make(model)
    opt.step()
    above = scene.peak_above(opt.step)
    turns = turn_about(five(opt), reference, scene=scene, rounds=2 if scene.toy else ROUNDS)
    return {
        **turns.to_json(steps=STEPS),
        "state_bytes_per_parameter": round(state_bytes(opt) / parameter_count(model), 3),
        "bytes_above_before_the_step_per_parameter": (
            above if isinstance(above, str) else round(above / parameter_count(model), 3)
        ),
        **({"kernels": kernels_of(opt.param_groups, opt.state)} if isinstance(opt, Sophia) else {}),
    }


def too_long(name: str, earlier: dict[str, Any], scene: Scene) -> bool:
    """Whether a method would not end in time: at the larger size three times as many matrices are decomposed
    at five times the work each, in three times five steps.
    """
    return 45 * STEPS * earlier.get(name, {}).get("milliseconds", 0.0) / 1e3 >= scene.left()


def measure(scene: Scene) -> dict[str, Any]:
    """Every method at both sizes, as far as the time goes."""
    sizes: dict[str, Any] = {}
    earlier: dict[str, Any] = {}
    for size in SIZES:
        model = with_gradients(scene.model(size), scene.device)
        reference = METHODS["adamw fused (control)"](model)
        count, rows = parameter_count(model), {}
        for name, make in METHODS.items():
            if too_long(name, earlier, scene):
                rows[name] = {"missing": "there was no time for it"}
                continue
            try:
                rows[name] = row_of(make, five(reference), scene, size)
                say(f"{size} {name:24s} {rows[name]['median']:7.3f}  {rows[name]['milliseconds']:9.2f} ms")
            except Exception as error:  # of another library, or of memory: the others are measured
                rows[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                say(f"{size} {name}: {rows[name]['error']}")
            scene.release()
        sizes[size] = {"parameters": count, "rows": rows}
        earlier = rows
        del model, reference
        scene.release()
    first = sizes[SIZES[0]]["rows"]
    return {
        "unit": "time of five steps over that of five of AdamW(fused=True), turn about (A B A), medians and "
        "quartiles of rounds; "
        + ("processor seconds" if scene.toy else "CUDA events")
        + "; milliseconds of one step",
        "sizes": sizes,
        "says": "; ".join(f"{name} {row['median']:.3f}" for name, row in first.items() if "median" in row),
    }
