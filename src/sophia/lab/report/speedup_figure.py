"""The forest plot: every contender's speed-up in every cost, with its interval."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sophia.lab.analysis.seed_noise import LEVEL
from sophia.lab.analysis.speedup import Ratio
from sophia.lab.analysis.verdict import Summary
from sophia.lab.analysis.verdict_words import ratio_words
from sophia.lab.report.colours import looks
from sophia.lab.report.loss_curves import STYLE
from sophia.lab.report.speedup_bar import HIGHEST, LOWEST

__all__ = ["draw"]


def draw(summary: Summary) -> Figure | None:
    """The figure; None if no contender has a speed-up."""
    verdicts = [v for v in summary.verdicts if v.speedups]
    if not verdicts:
        return None
    colour = {name: look.light for name, look in looks(summary.evidence.contenders).items()}
    count = sum(1 + len(v.speedups) for v in verdicts)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.9 + 0.22 * count), layout="constrained", facecolor="white")
        axes = figure.subplots()
        labels: list[tuple[str, str | None]] = []  # a name in its colour, then its costs
        for verdict in verdicts:
            if labels:
                axes.axhline(len(labels) - 0.5, color="#e6e6e6", lw=1)
            labels.append((verdict.contender, colour[verdict.contender]))
            for item in verdict.speedups:
                _bar(axes, len(labels), item.ratio, colour[verdict.contender])
                labels.append((item.cost, None))
        axes.axvline(1, color="#6b6b6b", lw=1.2, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(LOWEST, HIGHEST)
        axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
        axes.set_yticks(range(count), [words for words, _ in labels])
        for tick, (_, own) in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set(
                color=own or "#333333", fontsize=10 if own else 9, fontweight="bold" if own else "normal"
            )
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_ylim(count - 0.5, -0.5)
        words = f"Speed-up over {summary.evidence.baseline} at equal loss, {LEVEL:.0%} intervals"
        axes.set_title(words, loc="left", fontsize=11, color="#333333")
        FigureCanvasAgg(figure)
    return figure


def _bar(axes: Any, place: int, ratio: Ratio, colour: str) -> None:
    """A point, a line and the words; an arrow where an end is open or lies off the scale."""
    axes.text(1.02, place, ratio_words(ratio), transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    if ratio.low is not None and ratio.high is not None:
        floor, ceiling = max(ratio.floor, LOWEST), min(ratio.ceiling, HIGHEST)
        low, high = (min(max(v, floor), ceiling) for v in (ratio.low, ratio.high))
        axes.plot([low, high], [place, place], "-", color=colour, lw=2.6, solid_capstyle="butt")
        for open_end, at, marker in ((ratio.low < floor, low, "<"), (ratio.high > ceiling, high, ">")):
            if open_end:
                axes.plot(at, place, marker, color=colour, ms=7, clip_on=False)
    if max(ratio.floor, LOWEST) <= ratio.value <= min(ratio.ceiling, HIGHEST):
        axes.plot(ratio.value, place, "o", color=colour, ms=6.5)
