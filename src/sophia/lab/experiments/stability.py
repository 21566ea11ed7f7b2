"""Largest stable learning rate of deep, narrow GPTs, with and without the attention scaled by layer.

At this scale nothing overflows; a learning rate that is too large shows in a run that learns little more than
the frequencies of the bytes. So a run is called *lost* if it is not finite, or if it gains less than half of
what the best run of its kind gains over the entropy of single bytes. The learning rate doubles from run to
run; the largest stable one is the last before the first that is lost, beyond the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf, log2
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sophia.lab.config.run import Model, Setting
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.framework.small_runs import Bench, Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Cell", "cells", "largest_stable"]

SHAPE = Shape(
    Model(layers=24, width=32, heads=2, context=64, vocabulary=256),
    batch=8,
    steps=150,
    warmup=15,
    held_out=64,
)
DEPTHS = (3, 9, 24)
SEEDS = (1, 2, 3)
RUNGS = 3
"""Learning rates at most."""

QUICK = Shape(
    Model(layers=2, width=16, heads=2, context=16, vocabulary=256), batch=2, steps=8, warmup=2, held_out=4
)

# Searched at 1.1M parameters with ten trials each (results/searches/million), all but the learning rate.
SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "adamw": {"beta1": 0.7, "beta2": 0.95, "weight_decay": 0.2},
    "lion": {"beta1": 0.7, "beta2": 0.95, "weight_decay": 0.0},
    "sophia-g": {
        "beta1": 0.8,
        "beta2": 0.8,
        "gamma": 0.0101,
        "eps": 1e-7,
        "weight_decay": 0.1,
        "update_every": 10,
        "fraction": 0.25,
    },
}
CONTENDERS: Mapping[str, tuple[str, Mapping[str, Setting]]] = {
    "adamw": ("adamw", {}),
    "lion": ("lion", {}),
    # Sophia-G to the letter of Algorithm 2, with one label a prediction.
    "sophia-g": ("ablated", {"preconditioner": "gnb", "bound": "clip"}),
}
"""Rows of the table of contenders, with what makes them these."""
LOWEST = {"adamw": 2e-3, "lion": 5e-4, "sophia-g": 5e-4}
COLOURS = {"adamw": "#2b2b2b", "lion": "#0072b2", "sophia-g": "#d55e00"}


def run(quick: bool, records: Records, progress: Progress) -> None:
    """Climb the learning rates of each kind, every seed until it has met one that is too large."""
    shape, depths, seeds, rungs = (QUICK, (1, 2), (1, 2), 2) if quick else (SHAPE, DEPTHS, SEEDS, RUNGS)
    bench = Bench.on_bytes(progress)
    unigram = bench.text.unigram_entropy()
    kinds = list(product(depths, (False, True), SETTINGS))
    for rung in range(rungs):
        cases = [
            {"contender": c, "depth": d, "scaled": scaled, "lr": LOWEST[c] * 2**rung, "seed": seed}
            for d, scaled, c in kinds
            for seed in seeds
            if not _lost(records, depth=d, scaled=scaled, contender=c, seed=seed)
        ]
        for case in records.left(cases, progress):
            model = replace(shape.model, layers=case["depth"], scale_attention_by_layer=case["scaled"])
            contender, fixed = CONTENDERS[case["contender"]]
            end = bench.run(
                replace(shape, model=model),
                contender,
                {"lr": case["lr"], **SETTINGS[case["contender"]], **fixed},
                seed=case["seed"],
            )
            records.add(case, **end, unigram=unigram)


def _lost(records: Records, **case: Any) -> bool:
    """Whether a learning rate was too large already."""
    ladder = _ladder(records, **case)
    return bool(ladder) and largest_stable(ladder)[1]


def _ladder(records: Records, **case: Any) -> dict[float, float]:
    """Gain over single bytes by learning rate, nats a byte."""
    return {
        row.case["lr"]: -inf if row.result["loss"] is None else row.result["unigram"] - row.result["loss"]
        for row in records.where(**case)
    }


def largest_stable(gains: Mapping[float, float]) -> tuple[float, bool]:
    """The largest stable learning rate among runs that differ in nothing else, from what each gained; and
    whether a larger one was seen to be too large.

    >>> largest_stable({0.001: 0.4, 0.002: 0.5, 0.004: 0.3, 0.008: 0.1, 0.016: 0.4})
    (0.004, True)
    >>> largest_stable({0.001: 0.4, 0.002: 0.5})
    (0.002, False)
    """
    ladder = sorted(gains)
    best = max(ladder, key=lambda lr: gains[lr])
    if gains[best] <= 0:  # nothing was learned at any of them
        return best, False
    stable = best
    for lr in ladder[ladder.index(best) :]:
        if gains[lr] < gains[best] / 2:
            return stable, True
        stable = lr
    return stable, False


@dataclass(frozen=True)
class Cell:
    """One contender at one depth; lists are over the seeds."""

    contender: str
    depth: int
    without: list[float]
    """Largest stable learning rates."""
    with_: list[float]
    """The same with the attention scaled by layer."""
    bounded: bool
    """Whether each of them was seen to be the largest."""
    losses: tuple[float, float]
    """End loss at the best learning rate, without and with the scaling."""
    clipped: float
    """Share of steps whose gradient was clipped, at the best learning rate without the scaling."""

    @property
    def doublings(self) -> list[float]:
        """By how many factors of two the scaling raises the largest stable learning rate."""
        return [log2(w / wo) for w, wo in zip(self.with_, self.without, strict=True)]


def cells(records: Records) -> list[Cell]:
    """Every contender and depth whose runs are complete."""
    found = []
    for contender, depth in product(records.values("contender"), records.values("depth")):
        kind = {"contender": contender, "depth": depth}
        seeds = records.values("seed")
        stable: dict[bool, list[tuple[float, bool]]] = {}
        bests: dict[bool, tuple[float, float]] = {}
        for scaled in (False, True):
            ladders = [_ladder(records, **kind, scaled=scaled, seed=s) for s in seeds]
            stable[scaled] = [largest_stable(ladder) for ladder in ladders if ladder]
            if ends := _best(records, seeds, **kind, scaled=scaled):
                bests[scaled] = ends
        if len(bests) == 2 and all(len(s) == len(seeds) for s in stable.values()):
            found.append(
                Cell(
                    contender,
                    depth,
                    [lr for lr, _ in stable[False]],
                    [lr for lr, _ in stable[True]],
                    all(seen for pairs in stable.values() for _, seen in pairs),
                    (bests[False][0], bests[True][0]),
                    bests[False][1],
                )
            )
    return found


def _best(records: Records, seeds: Sequence[int], **kind: Any) -> tuple[float, float] | None:
    """Mean end loss and clipped share at the learning rate whose mean end loss is lowest."""
    means = []
    for lr in records.values("lr"):
        rows = [r.result for r in records.where(**kind, lr=lr) if r.result["loss"] is not None]
        if len(rows) == len(seeds):
            means.append((fmean(r["loss"] for r in rows), fmean(r["gradient_clipped"] for r in rows)))
    return min(means, default=None)


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 90% interval (Student's t)."""
    from scipy import stats

    mean = fmean(values)
    if len(values) < 2:
        return mean, -inf, inf
    error = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    half = float(stats.t.ppf(0.95, len(values) - 1)) * error
    return mean, mean - half, mean + half


def verdict(records: Records) -> Verdict:
    """At the largest depth: whom does the scaling help, and who clips."""
    deepest = max(records.values("depth"))
    at = {c.contender: c for c in cells(records) if c.depth == deepest}
    gains = {name: _interval(cell.doublings) for name, cell in at.items()}
    needs = {name: low > 0 for name, (_, low, _) in gains.items()}
    words = "; ".join(
        f"{name} {fmean(c.without):.2g} without and {fmean(c.with_):.2g} with it" for name, c in at.items()
    )
    clips = ", ".join(f"{name} {cell.clipped:.0%}" for name, cell in at.items())
    rivals = [name for name in at if name != "sophia-g"]
    first = all(needs[name] for name in rivals) and not needs["sophia-g"]
    second = all(at[name].clipped > 0.1 for name in rivals) and at["sophia-g"].clipped < 0.05
    seen = [name for name in at if needs[name]]
    sentence = (
        f"Largest stable learning rate at {deepest} layers, mean over {len(records.values('seed'))} seeds: "
        f"{words}. The scaling raises it, beyond what the seeds explain, for "
        f"{', '.join(seen) if seen else 'none of them'}. Steps whose gradient was clipped at 1, at the best "
        f"learning rate: {clips}."
    )
    if not all(cell.bounded for cell in at.values()):
        sentence += " For some no learning rate was too large."
    if first and second:
        return Verdict("holds", sentence)
    return Verdict("holds in part" if first or second else "not seen at this scale", sentence)


def draw(records: Records) -> Figure:
    """Largest stable learning rate against depth; end loss against learning rate; share of clipped steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(11, 4.0), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    found = cells(records)
    deepest = max(records.values("depth"))
    for shift, (name, colour) in enumerate(COLOURS.items()):
        mine = sorted((c for c in found if c.contender == name), key=lambda c: c.depth)
        at = [c.depth * (1 + 0.04 * (shift - 1)) for c in mine]
        for scaled, style in ((False, "o-"), (True, "s--")):
            rates = [c.with_ if scaled else c.without for c in mine]
            face = "white" if scaled else colour
            left.plot(at, [fmean(r) for r in rates], style, color=colour, mfc=face, ms=6)
            for x, several in zip(at, rates, strict=True):
                left.plot([x] * len(several), several, ".", color=colour, ms=4, alpha=0.6)
            ladder = sorted({r.case["lr"] for r in records.where(contender=name, depth=deepest)})
            ends = [
                [
                    r.result["loss"]
                    for r in records.where(contender=name, depth=deepest, scaled=scaled, lr=lr)
                    if r.result["loss"] is not None
                ]
                for lr in ladder
            ]
            points = [(lr, fmean(e)) for lr, e in zip(ladder, ends, strict=True) if e]
            if points:
                label = f"{name}{', scaled' if scaled else ''}"
                middle.plot(*zip(*points, strict=True), style, color=colour, mfc=face, ms=5, label=label)
        right.plot([c.depth for c in mine], [c.clipped for c in mine], "o-", color=colour, label=name)
    depths = sorted(records.values("depth"))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="layers")
        axes.xaxis.set_major_locator(FixedLocator(depths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(d) for d in depths])
    left.set(yscale="log")
    left.set_title("Largest stable learning rate / 1e-3", loc="left", fontsize=10)
    middle.set(xscale="log", xlabel="learning rate / 1e-3")
    middle.axhline(records.rows[0].result["unigram"], color="#999999", ls=":", lw=1)
    middle.set_title(f"End loss at {deepest} layers, nats a byte", loc="left", fontsize=10)
    middle.legend(frameon=False, fontsize=8)
    tried = sorted(records.values("lr"))
    for axis in (left.yaxis, middle.xaxis):
        axis.set_ticks(tried, [f"{1e3 * lr:g}" for lr in tried])
        axis.set_minor_locator(NullLocator())
    right.axhline(0.1, color="#999999", ls=":", lw=1)
    right.set_ylim(bottom=0)
    right.set_title("Share of steps with a clipped gradient", loc="left", fontsize=10)
    return figure


EXPERIMENT = Experiment(
    name="stability",
    title="largest stable learning rate with depth, and how often the gradient is clipped",
    claims=(5,),
    claim=(
        "AdamW and Lion need the scores of each attention divided by its layer index, or they stand half of "
        "the learning rate only (355M parameters, 24 layers: 1.5e-4 instead of 3e-4); Sophia does without. "
        "AdamW and Lion clip the gradient at norm 1 in more than a tenth of the steps, Sophia seldom "
        "(section on stability)."
    ),
    scale=(
        f"{SHAPE.words}; 3, 9 and 24 layers (0.05M to 0.3M parameters), float32, {len(SEEDS)} seeds. "
        "Sophia-G (single labels), AdamW and Lion with the settings of a search at 1.1M parameters, "
        f"{RUNGS} learning rates at most, by factors of two. The paper's runs are a thousand times larger, "
        "seven hundred times longer, in bfloat16, and had Sophia-H in this place."
    ),
    expected=(
        "No difference by the scaling: float32 does not overflow, and 150 steps hardly train the attention. "
        "Clipping in a tenth of the steps for all alike, most of them in the warm-up."
    ),
    runtime="about 10 minutes on one core; quick 3 s",
    figure=(
        "Left: largest stable learning rate against depth, mean (lines) and seeds (dots); dashed with the "
        "attention scaled by layer. Middle: end loss against learning rate at the largest depth; dotted, the "
        "entropy of single bytes. Right: share of steps whose gradient was clipped, at the best rate."
    ),
    record=(
        "A run: contender, layers, whether attention is scaled by layer, learning rate, seed; its end loss, "
        "the share of steps whose gradient was clipped, and the entropy of single bytes."
    ),
    run=run,
    draw=draw,
    verdict=verdict,
)
