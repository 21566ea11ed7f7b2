"""Curvature along the step that each optimizer takes, at the same held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from statistics import median
from typing import Any

from torch import Tensor, nn

from sophia.lab.config.run import Setting
from sophia.lab.experiments.framework import small_language_model
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.sharpness.along_a_step import expand, parts
from sophia.lab.experiments.sharpness.figure import draw
from sophia.lab.experiments.sharpness.matched_loss import (
    BASE,
    LEVELS,
    compared,
    expanded,
)
from sophia.lab.models import build

__all__ = ["CONTENDERS", "EXPERIMENT"]

CONTENDERS: Mapping[str, dict[str, Setting]] = {
    # The best of five or six trials at 8,192 tokens a step and 100 steps, on 0.6M parameters:
    # results/searches/large-batch and large-batch-apart-and-damped.
    "adamw": {"lr": 0.00343, "beta1": 0.7, "beta2": 0.98, "weight_decay": 0.0},
    "adamw-apart": {"lr": 0.0218, "matrix_lr": 0.000632, "beta1": 0.7, "beta2": 0.99, "weight_decay": 0.1},
    "muon": {"lr": 0.027, "adamw_lr": 0.0394, "momentum": 0.9, "beta1": 0.9, "weight_decay": 0.0},
    "sophia-g": {
        "lr": 0.00186,
        "beta1": 0.8,
        "beta2": 0.8,
        "gamma": 0.271,
        "eps": 1e-7,
        "weight_decay": 0.1,
    },
    "sophia-damped": {"lr": 0.00315, "beta1": 0.8, "gamma": 0.227, "damping": 0.5, "weight_decay": 0.0},
    # Near those of docs/large-batch.md, at 16,384 tokens a step; no search of their own.
    "sophia-spectral": {"lr": 0.025, "weight_decay": 0.0},
    "sophia-whitened": {"lr": 0.025, "weight_decay": 0.0},
}
STEPS, SEQUENCES, HELD_OUT, SEEDS = 100, 64, 16, (1, 2)
POINTS = (3, 9, 17, 32, 54, 76, 93)
"""Steps that are looked at, counted from 0: at several phases of what is renewed every fifth or tenth."""


def run(quick: bool, records: Records, progress: Progress) -> None:
    """Train each contender with each seed, and expand the held-out loss along some of its steps."""
    seeds = SEEDS[:1] if quick else SEEDS
    cases = [{"contender": contender, "seed": seed} for seed, contender in product(seeds, CONTENDERS)]
    for case in records.left(cases, progress):
        records.add(case, **_along(case["contender"], case["seed"], quick, progress))


def _along(contender: str, seed: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """One training run, with the expansions of its steps at ``POINTS``."""
    steps, points = (8, (1, 3, 5, 7)) if quick else (STEPS, POINTS)
    shape, source = small_language_model.shape(quick), small_language_model.text(quick)
    ids, _ = source.held_out(sequences=4 if quick else HELD_OUT, context=shape.context)
    # Looked at on a model of its own: the optimizer may be listening to the other.
    model, probe = (build.gpt2(shape, seed=seed) for _ in range(2))
    of = parts(probe)
    found: list[dict[str, Any]] = []
    before: list[Tensor] = []
    for step in small_language_model.training(
        model,
        contender,
        CONTENDERS[contender],
        source,
        steps=steps,
        batch=4 if quick else SEQUENCES,
        context=shape.context,
        seed=seed,
    ):
        if before:
            found.append({"step": step - 1, **asdict(expand(probe, ids, before, _weights(model), of))})
        before = _weights(model) if step in points else []
        progress.check()
        progress.within(step / steps, f"loss {found[-1]['loss']:.3f}" if found else "")
    return {"parts": list(of), "points": found}


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def verdict(records: Records) -> Verdict:
    """Whether the published Sophia steps along less curvature than AdamW at the same loss, in every seed; and
    whether Muon does, which is what was found elsewhere.
    """
    others = [name for name in records.values("contender") if name != BASE]
    sharpness, hidden, best = (
        {name: pairs for name in others if (pairs := compared(records, name, quantity))}
        for quantity in ("d'Hd / |d|^2", "the same of hidden matrices", "gain of the best length")
    )
    within = ", ".join(f"{_within(records, name):.0%} ({name})" for name in (BASE, *others))
    sentence = (
        f"d'Hd / |d|^2 over {BASE}'s, medians over {LEVELS} held-out losses that both pass, a number a seed: "
        f"{_listed(sharpness)}. Of hidden matrices by themselves: {_listed(hidden)}. What the best length of "
        f"a step in the direction taken would gain, likewise: {_listed(best)}. Within tensors lies {within} "
        f"of d'Hd over all points. To second order the expansion misses the true change of the loss by "
        f"{_missed(records):.0%} of the first-order gain (median over the steps looked at)."
    )
    if unmatched := [name for name in others if name not in sharpness]:
        sentence += f" No loss was passed by both {BASE} and {', '.join(unmatched)}."
    claimed = [sharpness.get(name, []) for name in ("sophia-g", "muon")]
    lower = [bool(pairs) and all(ours < base for ours, base in pairs) for pairs in claimed]
    higher = bool(claimed[0]) and all(ours > base for ours, base in claimed[0])
    if any(lower):
        return Verdict("holds" if all(lower) else "holds in part", sentence)
    return Verdict("contradicted" if higher else "not seen at this scale", sentence)


def _points(records: Records, *contenders: str) -> list[dict[str, Any]]:
    return [p for name in contenders for row in records.where(contender=name) for p in expanded(row)]


def _within(records: Records, contender: str) -> float:
    """Share of d'Hd / |d|^2 that lies within tensors. Of sums over points: at one where it is small, a share
    may be anything.
    """
    points = [(sum(p["within"]), p["hessian"], sum(p["squared"])) for p in _points(records, contender)]
    whole = float(sum(hessian / squared for _, hessian, squared in points))
    return float(sum(within / squared for within, _, squared in points)) / whole if whole else math.nan


def _missed(records: Records) -> float:
    """How far the expansion is from the true change, over the first-order gain, in the median."""
    points = _points(records, *records.values("contender"))
    return float(median(abs(p["change"] + p["gain"] - p["hessian"] / 2) / abs(p["gain"]) for p in points))


def _listed(found: Mapping[str, list[tuple[float, float]]]) -> str:
    return ", ".join(f"{name} {' and '.join(map(_over, pairs))}" for name, pairs in found.items())


def _over(pair: tuple[float, float]) -> str:
    """A ratio, where it is one.

    >>> _over((1.0, 4.0)), _over((1.0, -4.0))
    ('0.25', '1 against -4')
    """
    ours, base = pair
    return f"{ours / base:.2g}" if base > 0 else f"{ours:.2g} against {base:.2g}"


EXPERIMENT = Experiment(
    name="sharpness",
    title="curvature along the step that each optimizer takes, at the same loss",
    claims=(2,),
    claim=(
        "Sophia penalises sharp dimensions more than Adam does (introduction and section 2.1), which the "
        "paper does not measure in a language model. Ours: then the curvature along its steps, d'Hd / |d|^2, "
        "is lower than along Adam's at the same held-out loss. arXiv 2606.04662 finds that of Muon, with "
        "first-order gains and lengths of steps like Adam's; so it is asked of Muon here too."
    ),
    scale=(
        f"GPT-2 of 0.7M parameters, {STEPS} steps of 4,096 tokens, warm-up of a tenth, cosine, {len(SEEDS)} "
        "seeds. Seven contenders with the best settings of the searches large-batch and "
        "large-batch-apart-and-damped (five or six trials each, as many steps of 8,192 tokens, 0.6M "
        "parameters), spectral and whitened near those of docs/large-batch.md (16,384 tokens), no decay. At "
        f"{len(POINTS)} steps d is the whole change of the weights, decay and the clipping of gradients "
        f"included; loss, g and exact d'Hd and d'Gd (Gauss-Newton) are of {HELD_OUT} held-out sequences."
    ),
    expected=(
        "Muon below AdamW, as found elsewhere. Sophia-G open: where most coordinates are clipped its step is "
        "that of sign momentum, which knows no curvature. adamw-apart and muon put more of their step into "
        "the table of tokens, which is flat, and may be lower for that alone: hence the hidden matrices by "
        "themselves."
    ),
    runtime="about 15 minutes on one core; quick 20 s",
    figure=(
        "Against the held-out loss, which falls from left to right, a line a seed: first-order gain and "
        "squared length of the step; curvature along it, of the whole Hessian and of its Gauss-Newton part; "
        "the same of the hidden matrices by themselves; the share of d'Hd that lies within tensors (dotted: "
        "all); second-order penalty over first-order gain (above 1, dotted, the loss rises); what the best "
        "length of a step in this direction would gain, by Gauss-Newton."
    ),
    record=(
        "A contender and a seed: at each step looked at the held-out loss, its true change, -g'd, d'Hd, "
        "d'Gd, for each part (a matrix; all vectors) d'Hd within it and squared lengths of step and weights, "
        "and d'Hd within table, hidden matrices and vectors."
    ),
    run=run,
    draw=draw,
    verdict=verdict,
    parts=("gnb", "paper", "damped", "spectral", "whitened"),
)
