"""What a step of Sophia costs beside one of AdamW: seconds of processor time, and operations counted.

T(step) is a whole training step, forward and backward and clipping of the gradient included, on average over
ten of which one refreshes. T(Hessian) is what the refresh adds to its step. Times are of the processor, taken
turn about (A B A) with AdamW on the same batch, so a machine that slows down slows both; what is given is a
ratio of a round, its median over rounds. Operations are counted by torch, from the products of matrices that
are really done, forward to second derivative; the step itself has none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from sophia.lab.config.run import Model
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records, Row
from sophia.lab.models import build
from sophia.lab.optimizers import table as contenders

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "PAPER", "added"]

K = 10
BATCH = 30
"""Sequences; divides into the paper's shares, a half for Gauss-Newton-Bartlett, a fifteenth for
Hutchinson.
"""
FRACTIONS = {"adamw": 0.0, "sophia-h": 1 / 15, "sophia-g": 0.5}
"""Of the batch in a refresh: none, 32 of 480, 240 of 480."""

SIZES: dict[str, Model] = {
    "0.3M": Model(layers=3, width=48, heads=3, context=64),
    "1.1M": Model(layers=3, width=128, heads=4, context=64),
}

PAPER: dict[str, dict[str, tuple[float, float, float]]] = {
    "355M": {"adamw": (1.77, 0.0, 1195), "sophia-h": (1.88, 0.09, 1249), "sophia-g": (1.86, 0.09, 1255)},
    "770M": {"adamw": (3.25, 0.0, 2550), "sophia-h": (3.40, 0.12, 2708), "sophia-g": (3.42, 0.17, 2678)},
}
"""The paper's table as recalled, not held to its text: T(step), T(Hessian) in seconds, TFLOPs of a step."""


@dataclass
class _Trainer:
    """A model, an optimizer, a batch."""

    model: nn.Module
    optimizer: Optimizer
    batch: Tensor

    @classmethod
    def of(cls, contender: str, shape: Model, batch: int) -> _Trainer:
        model = build.build(shape, seed=1)
        row = contenders.find(contender)
        over = {"update_every": K, "fraction": FRACTIONS[contender]} if FRACTIONS[contender] else {}
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(shape.vocabulary, (batch, shape.context), generator=generator)
        return cls(model, row.build(model, row.settings(over), 1), ids)

    def step(self) -> None:
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, *, steps: int) -> float:
        """Processor time of so many steps."""
        start = time.process_time()
        for _ in range(steps):
            self.step()
        return time.process_time() - start


def _operations(contender: str, shape: Model, batch: int) -> tuple[float, float]:
    """Floating-point operations of a step without a refresh, and what a refresh adds."""
    # The fused attention has no second derivative on every device: count all contenders without it.
    trainer = _Trainer.of(contender, shape, batch)
    trainer.model.set_attn_implementation("eager")  # type: ignore[operator]
    counts = []
    # The steps 0 and K refresh. The first of them also finds out, once, whether rows may be taken alone.
    for _ in range(K + 1):
        with FlopCounterMode(display=False) as counter:
            trainer.step()
        counts.append(float(counter.get_total_flops()))
    return counts[1], counts[K] - counts[1]


def run(quick: bool, records: Records, progress: Progress) -> None:
    """Count and time each contender at each size; a control times AdamW against itself."""
    tiny = Model(layers=1, width=16, heads=2, context=8, vocabulary=64)
    sizes = {"tiny": tiny} if quick else SIZES
    rounds, batch = (1, 15) if quick else (3, BATCH)
    # AdamW is timed against itself: the control.
    cases = [{"size": size, "contender": contender} for size in sizes for contender in FRACTIONS]
    for case in records.left(cases, progress):
        shape = sizes[case["size"]]
        own, reference = _Trainer.of(case["contender"], shape, batch), _Trainer.of("adamw", shape, batch)
        for trainer in (own, reference):
            trainer.seconds(steps=K)  # warm: the refresh falls on the first of ten
        step_ratios, refresh_ratios, seconds = [], [], []
        for number in range(rounds):
            before = reference.seconds(steps=K)
            refreshing, others = own.seconds(steps=1), own.seconds(steps=K - 1)
            after = reference.seconds(steps=K)
            adamw = (before + after) / 2 / K
            step_ratios.append((refreshing + others) / K / adamw)
            refresh_ratios.append((refreshing - others / (K - 1)) / adamw)
            seconds.append(adamw)
            progress.within((number + 1) / rounds)
        flops, more = _operations(case["contender"], shape, batch)
        records.add(
            case,
            parameters=build.parameter_count(own.model),
            batch=batch,
            adamw_seconds=median(seconds),
            step=median(step_ratios),
            step_range=[min(step_ratios), max(step_ratios)],
            refresh=median(refresh_ratios),
            flops=flops + more / K,
            refresh_flops=more,
        )


def added(records: Records, size: str, contender: str) -> tuple[float, float]:
    """What a contender adds to AdamW's step, in time and in operations, as fractions. Its time is already a
    ratio to the AdamW beside it; the row of AdamW is the control.
    """
    row, base = _row(records, size, contender), _row(records, size, "adamw")
    return row.result["step"] - 1, row.result["flops"] / base.result["flops"] - 1


def _row(records: Records, size: str, contender: str) -> Row:
    return records.where(size=size, contender=contender)[0]


def verdict(records: Records) -> Verdict:
    """The paper's two numbers, under 5% of time and about 6% of compute, at the largest size."""
    size = records.values("size")[-1]
    found = {c: added(records, size, c) for c in FRACTIONS if c != "adamw"}
    control = _row(records, size, "adamw").result
    noise = max(abs(x - 1) for x in control["step_range"])
    small = records.values("size")[0]
    words = "; ".join(
        f"{c} {time_:+.1%} of time and {flops:+.1%} of operations" for c, (time_, flops) in found.items()
    )
    starts = ", ".join(f"{c} {added(records, small, c)[0]:+.1%}" for c in ("adamw", *found))
    refreshes = ", ".join(f"{c} {_row(records, size, c).result['refresh']:.2f}" for c in found)
    sentence = (
        f"Against AdamW at {control['parameters'] / 1e6:.1f}M parameters, one processor thread: {words} "
        f"(time at the smallest size: {starts}). A refresh adds, in steps of AdamW: {refreshes}. AdamW "
        f"against itself strays by up to {noise:.1%} from one round to the next. No GPU was timed."
    )
    times, counts = [t for t, _ in found.values()], [f for _, f in found.values()]
    below, above = all(t + noise < 0.05 for t in times), any(t - noise > 0.05 for t in times)
    if not below and not above:
        sentence += (
            " So the times do not decide whether it is less than 5%; the counts do not depend on them."
        )
    few = all(f < 0.065 for f in counts)
    if below and few:
        return Verdict("holds", sentence)
    return Verdict("contradicted" if above and not few else "holds in part", sentence)


def draw(records: Records) -> Figure:
    """What is added in time and in operations by size, the paper's beside it; and the table of numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    left, middle, table = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    sizes = [s for s in records.values("size") if len(records.where(size=s)) == len(FRACTIONS)]
    names = [*sizes, *PAPER]
    for axes, part, title in ((left, 0, "Time"), (middle, 1, "Operations")):
        for shift, (contender, colour) in enumerate({"sophia-h": "#0072b2", "sophia-g": "#d55e00"}.items()):
            heights = [100 * added(records, s, contender)[part] for s in sizes]
            heights += [100 * (_paper(s, contender)[part] - 1) for s in PAPER]
            for place, (height, name) in enumerate(zip(heights, names, strict=True)):
                style: dict[str, Any] = {"color": colour}
                if name in PAPER:
                    style = {"facecolor": "white", "edgecolor": colour, "hatch": "///"}
                bar = axes.bar(place + 0.38 * (shift - 0.5), height, 0.36, **style)
                axes.bar_label(bar, fmt="%.1f", fontsize=8)
            axes.bar(0, 0, color=colour, label=contender)
        axes.set_xticks(range(len(names)), [n + ("\npaper*" if n in PAPER else "") for n in names])
        axes.axhline(0, color="#999999", lw=0.8)
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
        axes.set_title(f"{title} of a step, % over AdamW's", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    table.axis("off")
    rows = []
    for s in sizes:
        # One second for a size: between contenders the machine's own speed changes by more than they differ.
        unit = 1e3 * _row(records, s, "adamw").result["adamw_seconds"]
        for c in FRACTIONS:
            r = _row(records, s, c).result
            times = (unit * r["step"], unit * r["refresh"]) if FRACTIONS[c] else (unit, None)
            shown = [f"{t:.0f} ms" if t is not None else "" for t in times]
            rows.append([s, c, *shown, f"{r['flops'] / 1e9:.2f} G"])
    rows += [
        [f"{s}*", c, f"{step:.2f} s", f"{hessian:.2f} s" if hessian else "", f"{tera:.0f} T"]
        for s, those in PAPER.items()
        for c, (step, hessian, tera) in those.items()
    ]
    drawn = table.table(
        rows, colLabels=["size", "", "T(step)", "T(Hessian)", "FLOPs"], loc="upper left", edges="open"
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8.5)
    table.set_title("* the paper's, as recalled", loc="left", fontsize=9)
    return figure


def _paper(size: str, contender: str) -> tuple[float, float]:
    """Ratios of time and operations to AdamW in the paper's table, as recalled."""
    own, base = PAPER[size][contender], PAPER[size]["adamw"]
    return own[0] / base[0], own[2] / base[2]


EXPERIMENT = Experiment(
    name="overhead",
    title="time and operations of a step: AdamW, Sophia-H, Sophia-G",
    claims=(3,),
    claim=(
        "With a refresh every ten steps, on 32 (Hutchinson) or 240 (Gauss-Newton-Bartlett) of 480 sequences, "
        "the Hessian takes 6% of the compute and less than 5% of the time of a step, and no more memory than "
        "AdamW (section 3; its table of costs is quoted as recalled)."
    ),
    scale=(
        "GPT-2 of 0.3M and 1.1M parameters, 30 sequences of 64 tokens, float32, one processor thread, "
        "AdamW fused; single labels, which were the default when it was run. The paper timed 355M and 770M "
        "in bfloat16 on GPUs. Refreshes use the same shares of the batch. Memory is measured elsewhere "
        "(results/benchmarks)."
    ),
    expected=(
        "Gauss-Newton-Bartlett +5% by count (half a forward and backward in ten steps); Hutchinson +1.3% to "
        "+2%, with second derivatives that cost two or three gradients; time a little above the count."
    ),
    runtime="about 2 minutes on one core; quick 3 s",
    figure=(
        "Left: time of a whole step more than AdamW's, refreshes included, medians of rounds turn about; "
        "middle: operations counted by torch. Hatched: the paper's table as recalled. Right: the numbers; "
        "times are AdamW's at that size, times the ratios."
    ),
    record=(
        "A contender at a size: its step over AdamW's (median and range over rounds), what a refresh adds in "
        "steps of AdamW, operations of a step on average and of a refresh. The row of AdamW is the control."
    ),
    run=run,
    draw=draw,
    verdict=verdict,
    parts=("gnb", "hutchinson", "paper"),
)
