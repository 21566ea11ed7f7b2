"""The picture of a comparison: validation loss during training, and end losses with the speed-up.

Lines are labelled where they end, with the contender's mark, so no legend has to be matched by colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from sophia.lab.analysis.read_records import Evidence, Run, number
from sophia.lab.analysis.verdict import Summary
from sophia.lab.analysis.verdict_words import bound_words
from sophia.lab.report.colours import Look, looks
from sophia.lab.report.labels import Label, marker, place_labels

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


def draw(summary: Summary) -> Figure:
    """The figure, readable at the width of a README: 10 x 4.4 inches, larger for more than six contenders,
    whose labels take more room.
    """
    many = max(0, len(summary.evidence.contenders) - 6)
    size = (10 + min(1.6, 0.4 * many), 4.4 + min(0.6, 0.15 * many) + 0.25 * max(0, many - 6))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
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
    evidence, look = summary.evidence, looks(summary.evidence.contenders)
    largest = max((r.steps for r in evidence.runs), default=1)
    labels: list[Label] = []
    late: list[float] = []
    for contender in evidence.contenders:
        for budget in sorted({r.steps for r in evidence.runs if r.contender == contender}):
            runs = [r for r in evidence.runs if (r.contender, r.steps) == (contender, budget)]
            curves, full = [], budget == largest
            for run in runs:
                steps, losses = _curve(run)
                if len(steps) < 2:
                    continue
                axes.plot(steps, losses, color=look[contender].light, lw=0.7, alpha=0.4)
                if (
                    run.status == "diverged"
                ):  # shown to its end, but neither in the mean nor in the range of the axis
                    axes.plot(steps[-1], losses[-1], "x", ms=8, mew=2, color=look[contender].light)
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
                color=look[contender].light,
                lw=2.2 if full else 1.5,
                ls="-" if full else (0, (4, 1.6)),
            )
            if full and shared[-1] > 0.9 * largest:
                labels.append((mean[-1], f"{contender} {mean[-1]:.2f}", look[contender]))
    if late:
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))
    _target(axes, evidence)
    axes.set_xlim(0, largest * 1.0)
    place_labels(axes, largest, labels)
    axes.set_xlabel("steps (solid: full budget, dashed: smaller budgets)", loc="left")
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


def _end_losses(axes: Any, summary: Summary) -> None:
    evidence, look = summary.evidence, looks(summary.evidence.contenders)
    budgets = sorted({r.steps for r in evidence.runs})
    labels: list[Label] = []
    speedups = _speedups_for_labels(summary)
    for contender in evidence.contenders:
        rows = [r for r in summary.rows if r.contender == contender and r.loss is not None]
        own = look[contender]
        for run in evidence.runs:
            loss = run.number("loss")
            if run.contender == contender and run.status == "finished" and loss is not None:
                axes.plot(run.steps, loss, "o", ms=3, color=own.light, mew=0, zorder=4)
        if rows:
            steps, losses = [r.steps for r in rows], [r.loss for r in rows]
            smooth = contender == evidence.baseline and summary.curve is not None
            axes.plot(
                steps,
                losses,
                ls="",
                marker=marker(own),
                ms=9,
                mfc="white",
                mew=1.6,
                color=own.light,
                zorder=3,
            )
            if not smooth:
                axes.plot(steps, losses, "-", lw=1.4, color=own.light)
            labels.append((float(losses[-1] or 0.0), contender + speedups.get(contender, ""), own))
    if summary.curve is not None:
        dense = np.geomspace(budgets[0], budgets[-1], 60)
        axes.plot(
            dense,
            [summary.curve.loss(float(d)) for d in dense],
            "-",
            lw=1.4,
            color=look[evidence.baseline].light,
        )
    axes.set_xscale("log")
    if budgets:
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(budgets[0] / 1.12, budgets[-1] * 1.06)
        _target(axes, evidence)
        place_labels(axes, budgets[-1], labels)
    if not speedups:
        _arrows(axes, summary, look)
    starred = any(text.endswith("*") for text in speedups.values())
    axes.set_xlabel("budget in steps" + ("  (* extrapolated)" if starred else ""), loc="left")
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


def _arrows(axes: Any, summary: Summary, look: dict[str, Look]) -> None:
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
            arrowprops={"arrowstyle": "->", "color": look[verdict.contender].light, "lw": 1.3, "ls": "--"},
        )
        axes.annotate(
            bound_words(ratio.value, ratio, unit="x"),
            ((end * row.steps) ** 0.5, row.loss),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=look[verdict.contender].light,
            fontsize=10,
        )
