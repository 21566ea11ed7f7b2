"""Presets: named sizes of an experiment, with the settings each contender was given there.

A preset says everything about a comparison but its text, contenders and seeds. Settings that a preset does
not name are the contender's defaults; those it names come from a search with equal trials for every contender
named, which is recorded in ``results``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sophia.lab.config import Data, Evaluation, Model, Optimizer, Run, Schedule, Setting
from sophia.lab.contenders import find
from sophia.lab.errors import UsageError

__all__ = ["PRESETS", "Preset", "preset", "run"]


@dataclass(frozen=True)
class Preset:
    """A size of experiment."""

    name: str
    about: str
    """One line for the help text."""
    budgets: tuple[int, ...]
    """Steps of the runs, each with a whole schedule of its own."""
    seeds: int
    """Number of seeds unless the user says another."""
    warmup: float
    """Warm-up as a fraction of the steps."""
    batch: int
    """Sequences in a step."""
    model: Model
    evaluations: int
    """Evaluations of a run after the one at step 0."""
    sequences: int
    """Held-out sequences of an evaluation."""
    settings: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)
    """Settings by contender, over its defaults."""
    micro_batches: int = 1
    floor: float = 0.05
    """Last learning rate as a fraction of the peak."""
    log_every: int = 10


PRESETS: Mapping[str, Preset] = {
    p.name: p
    for p in (
        Preset(
            name="quick",
            about="0.7M parameters, a few minutes on two cores",
            budgets=(400, 800),
            seeds=2,
            warmup=0.1,
            batch=16,
            model=Model(layers=3, width=96, heads=3, context=64),
            evaluations=8,
            sequences=512,
            settings={
                "adamw": {"lr": 5.07e-3, "beta1": 0.8, "beta2": 0.95},
                "sophia-g": {"lr": 1.49e-3, "beta1": 0.8, "beta2": 0.8, "gamma": 0.0202},
            },
        ),
        Preset(
            name="small",
            about="1.3M parameters, some hours on two cores",
            budgets=(1500, 3000, 6000),
            seeds=3,
            warmup=0.05,
            batch=32,
            model=Model(layers=4, width=128, heads=4, context=128),
            evaluations=15,
            sequences=512,
            log_every=25,
        ),
        Preset(
            name="tiny",
            about="0.1M parameters, seconds; to see that everything works, not for verdicts",
            budgets=(20, 40),
            seeds=2,
            warmup=0.1,
            batch=4,
            model=Model(layers=1, width=24, heads=2, context=32),
            evaluations=2,
            sequences=16,
            log_every=5,
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises ``UsageError`` that lists the names."""
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}. Choose from: {', '.join(PRESETS)}.")
    return PRESETS[name]


def run(
    size: Preset,
    *,
    contender: str,
    data: Data,
    seed: int,
    steps: int,
    over: Mapping[str, Setting] | None = None,
    device: str = "cpu",
) -> Run:
    """One run: the preset, its settings of the contender, and ``over`` on top."""
    settings = find(contender).settings({**size.settings.get(contender, {}), **(over or {})})
    return Run(
        data=data,
        optimizer=Optimizer(contender, settings),
        model=size.model,
        schedule=Schedule(warmup=round(size.warmup * steps), floor=size.floor),
        evaluation=Evaluation(every=max(1, round(steps / size.evaluations)), sequences=size.sequences),
        steps=steps,
        batch=size.batch,
        micro_batches=size.micro_batches,
        seed=seed,
        log_every=size.log_every,
        device=device,
    )
