"""The forest plot: every contender's speed-up in every cost, with its interval."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sophia.lab.figures import STYLE, colours
from sophia.lab.forest import HIGHEST, LOWEST
from sophia.lab.sentences import ratio_words
from sophia.lab.speedup import Ratio
from sophia.lab.statistics import Summary

__all__ = ["draw"]


def draw(summary: Summary) -> Figure | None:
    """The figure; None if no contender has a speed-up."""
    rows = [(v.contender, s) for v in summary.verdicts for s in v.speedups]
    if not rows:
        return None
    colour = colours(summary.evidence)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.1 + 0.3 * len(rows)), layout="constrained", facecolor="white")
        axes = figure.subplots()
        labels = []
        for place, (contender, item) in enumerate(rows):
            first = place == 0 or rows[place - 1][0] != contender
            labels.append(f"{contender}   {item.cost}" if first else item.cost)
            if first and place:
                axes.axhline(place - 0.5, color="#e6e6e6", lw=1)
            _bar(axes, place, item.ratio, colour[contender])
            axes.text(
                1.02,
                place,
                ratio_words(item.ratio),
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=9,
            )
        axes.axvline(1, color="#6b6b6b", lw=1.2, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(LOWEST, HIGHEST)
        axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(axis="y", length=0, labelcolor="#333333", labelsize=9)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(
            f"Speed-up over {summary.evidence.baseline} at equal loss, 90% intervals",
            loc="left",
            fontsize=11,
            color="#333333",
        )
        FigureCanvasAgg(figure)
    return figure


def _bar(axes: Any, place: int, ratio: Ratio, colour: str) -> None:
    """A point and a line; an arrow where an end is open or lies off the scale."""
    if ratio.low is not None and ratio.high is not None:
        floor, ceiling = max(ratio.floor, LOWEST), min(ratio.ceiling, HIGHEST)
        low, high = (min(max(v, floor), ceiling) for v in (ratio.low, ratio.high))
        axes.plot([low, high], [place, place], "-", color=colour, lw=2.6, solid_capstyle="butt")
        for open_end, at, marker in ((ratio.low < floor, low, "<"), (ratio.high > ceiling, high, ">")):
            if open_end:
                axes.plot(at, place, marker, color=colour, ms=7, clip_on=False)
    if max(ratio.floor, LOWEST) <= ratio.value <= min(ratio.ceiling, HIGHEST):
        axes.plot(ratio.value, place, "o", color=colour, ms=6.5)
