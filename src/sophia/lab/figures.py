"""The picture of a comparison: validation loss during training, and end losses with the speed-up.

Colours are Okabe and Ito's (distinguishable with the common colour-vision deficiencies); the baseline is
dark and neutral. Lines are labelled where they end, so no legend has to be matched by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from sophia.lab.evidence import Evidence, Run, number
from sophia.lab.sentences import bound_words
from sophia.lab.statistics import Summary

BASELINE = "#2b2b2b"
CONTENDERS = ("#d55e00", "#0072b2", "#009e73", "#b8578f", "#8a6d00", "#3a8fb7")
"""Okabe and Ito's hues, the light ones darkened until they reach 3:1 on white."""

GREY = "#6b6b6b"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#333333",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "svg.hashsalt": "sophia",
}


def colours(evidence: Evidence) -> dict[str, str]:
    """A colour for each contender; after six they repeat, and the labels tell."""
    return {
        c: BASELINE if i == 0 else CONTENDERS[(i - 1) % len(CONTENDERS)]
        for i, c in enumerate(evidence.contenders)
    }


def draw(summary: Summary) -> Figure:
    """The figure: 10 x 4.4 inches, readable at the width of a README."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _training(left, summary)
        _end_losses(right, summary)
        FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write name.png and name.svg; the same records give the same bytes."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=160, metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return png, svg


def _curve(run: Run) -> tuple[list[float], list[float]]:
    """Steps and validation losses of a run, finite ones only."""
    points = [
        (step, loss)
        for row in run.evaluations
        if (step := number(row.get("step"))) is not None and (loss := number(row.get("loss"))) is not None
    ]
    return [p[0] for p in points], [p[1] for p in points]


def _training(axes: Any, summary: Summary) -> None:
    evidence, colour = summary.evidence, colours(summary.evidence)
    largest = max((r.steps for r in evidence.runs), default=1)
    labels: list[tuple[float, str, str]] = []
    late: list[float] = []
    for contender in evidence.contenders:
        for budget in sorted({r.steps for r in evidence.runs if r.contender == contender}):
            runs = [r for r in evidence.runs if (r.contender, r.steps) == (contender, budget)]
            curves, full = [], budget == largest
            for run in runs:
                steps, losses = _curve(run)
                if len(steps) < 2:
                    continue
                axes.plot(steps, losses, color=colour[contender], lw=0.7, alpha=0.4)
                if (
                    run.status == "diverged"
                ):  # shown to its end, but neither in the mean nor in the range of the axis
                    axes.plot(steps[-1], losses[-1], "x", ms=8, mew=2, color=colour[contender])
                    continue
                curves.append((steps, losses))
                late += [y for x, y in zip(steps, losses, strict=True) if x >= 0.15 * budget]
            shared = sorted(set.intersection(*(set(c[0]) for c in curves))) if curves else []
            if not shared:
                continue
            mean = [float(np.mean([dict(zip(*c, strict=True))[x] for c in curves])) for x in shared]
            axes.plot(
                shared,
                mean,
                color=colour[contender],
                lw=2.2 if full else 1.5,
                ls="-" if full else (0, (4, 1.6)),
            )
            if full and shared[-1] > 0.9 * largest:
                labels.append((mean[-1], f"{contender} {mean[-1]:.2f}", colour[contender]))
    if late:
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))
    _target(axes, evidence)
    axes.set_xlim(0, largest * 1.0)
    place_labels(axes, largest, labels)
    axes.set_xlabel("steps (solid: full budget, dashed: smaller budgets)")
    axes.set_title("Validation loss, nats a token", loc="left", fontsize=11, color="#333333")


def _target(axes: Any, evidence: Evidence) -> None:
    """A dashed line at the target of the protocol, inside the range of the axis."""
    if evidence.target is None:
        return
    low, high = axes.get_ylim()
    edge = 0.04 * (high - low)
    axes.set_ylim(min(low, evidence.target - edge), max(high, evidence.target + edge))
    axes.axhline(evidence.target, color=GREY, lw=1, ls=(0, (5, 3)), zorder=1)
    axes.annotate(
        f"target {evidence.target:g}",
        (0.01, evidence.target),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
        color="#333333",
    )


def place_labels(axes: Any, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each label right of its line's end, pushed apart where lines end together."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ordered = sorted(labels)
    wanted = [min(max(y, low), high) for y, _, _ in ordered]
    for _ in range(
        200
    ):  # neighbours that overlap move apart by the same amount, so a group stays around its middle
        for i in range(1, len(wanted)):
            push = max(0.0, (gap - (wanted[i] - wanted[i - 1])) / 2)
            wanted[i - 1], wanted[i] = wanted[i - 1] - push, wanted[i] + push
    for y, (_, text, colour) in zip(wanted, ordered, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def _end_losses(axes: Any, summary: Summary) -> None:
    evidence, colour = summary.evidence, colours(summary.evidence)
    budgets = sorted({r.steps for r in evidence.runs})
    labels: list[tuple[float, str, str]] = []
    speedups = _speedups_for_labels(summary)
    for contender in evidence.contenders:
        rows = [r for r in summary.rows if r.contender == contender and r.loss is not None]
        for run in evidence.runs:
            loss = run.number("loss")
            if run.contender == contender and run.status == "finished" and loss is not None:
                axes.plot(run.steps, loss, "o", ms=3, color=colour[contender], mew=0, zorder=4)
        if rows:
            steps, losses = [r.steps for r in rows], [r.loss for r in rows]
            smooth = contender == evidence.baseline and summary.curve is not None
            axes.plot(steps, losses, "o", ms=8, mfc="white", mew=1.6, color=colour[contender], zorder=3)
            if not smooth:
                axes.plot(steps, losses, "-", lw=1.4, color=colour[contender])
            labels.append(
                (float(losses[-1] or 0.0), contender + speedups.get(contender, ""), colour[contender])
            )
    if summary.curve is not None:
        dense = np.geomspace(budgets[0], budgets[-1], 60)
        axes.plot(dense, [summary.curve.loss(float(d)) for d in dense], "-", lw=1.4, color=BASELINE)
    axes.set_xscale("log")
    if budgets:
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(budgets[0] / 1.12, budgets[-1] * 1.06)
        _target(axes, evidence)
        place_labels(axes, budgets[-1] * 1.06, labels)
    if not speedups:
        _arrows(axes, summary, colour)
    starred = any(text.endswith("*") for text in speedups.values())
    axes.set_xlabel("budget in steps" + ("  (* extrapolated)" if starred else ""))
    axes.set_title(
        "End loss of fully decayed runs, with the speed-up", loc="left", fontsize=11, color="#333333"
    )


def _speedups_for_labels(summary: Summary) -> dict[str, str]:
    """Text behind a contender's name. With many contenders arrows would lie on each other; a star marks what
    lies beyond the baseline's runs.
    """
    if len(summary.verdicts) <= 2:
        return {}
    return {
        v.contender: f" {bound_words(ratio.value, ratio, unit='x')}{'*' if ratio.extrapolated else ''}"
        for v in summary.verdicts
        if v.speedups
        for ratio in [v.speedups[0].ratio]
    }


def _arrows(axes: Any, summary: Summary, colour: dict[str, str]) -> None:
    """From the contender's budget to the baseline's for the same loss, where that was measured."""
    if summary.curve is None:
        return
    for verdict in summary.verdicts:
        row = next(
            (r for r in reversed(summary.rows) if r.contender == verdict.contender and r.loss is not None),
            None,
        )
        if row is None or row.loss is None or not verdict.speedups:
            continue
        ratio = verdict.speedups[0].ratio
        if ratio.extrapolated or abs(ratio.value - 1) < 0.02:
            continue  # the baseline's curve does not reach this loss, or the arrow would have no length
        end = ratio.value * row.steps
        axes.annotate(
            "",
            (end, row.loss),
            xytext=(row.steps, row.loss),
            arrowprops={"arrowstyle": "->", "color": colour[verdict.contender], "lw": 1.3, "ls": "--"},
        )
        axes.annotate(
            bound_words(ratio.value, ratio, unit="x"),
            ((end * row.steps) ** 0.5, row.loss),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=colour[verdict.contender],
            fontsize=10,
        )
