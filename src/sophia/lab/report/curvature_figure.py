"""The picture of a second-order optimizer's state over time: which bound decides a step, and how large h is.

One row for each contender that says so of itself. Left the share of coordinates that the clip leaves alone
and the share whose h is below eps; right the 5%, 50% and 95% quantiles of h. Means over the seeds of the
largest budget that has them; those of h are geometric.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sophia.lab.analysis.read_records import Evidence, Run, number
from sophia.lab.report.colours import looks
from sophia.lab.report.loss_curves import STYLE

__all__ = ["Course", "courses", "draw"]

SHARES = ("unclipped", "eps_limited")
QUANTILES = ("h_q05", "h_q50", "h_q95")


@dataclass(frozen=True)
class Course:
    """One contender's numbers over its steps."""

    contender: str
    budget: int
    steps: tuple[float, ...]
    values: dict[str, tuple[float | None, ...]]
    """By name in the records; None where a seed has no (positive) value."""


def courses(evidence: Evidence) -> tuple[Course, ...]:
    """A course for every contender whose rows tell of the clip or of h."""
    found = []
    for contender in evidence.contenders:
        telling = [
            run
            for run in evidence.runs
            if run.contender == contender and run.status != "diverged" and _tells(run)
        ]
        if not telling:
            continue
        budget = max(run.steps for run in telling)
        runs = [{row["step"]: row for row in run.train} for run in telling if run.steps == budget]
        steps = sorted(set.intersection(*(set(rows) for rows in runs)))
        values = {
            key: tuple(
                _mean([number(rows[step].get(key)) for rows in runs], geometric=key in QUANTILES)
                for step in steps
            )
            for key in (*SHARES, *QUANTILES)
        }
        found.append(Course(contender, budget, tuple(float(step) for step in steps), values))
    return tuple(found)


def _tells(run: Run) -> bool:
    return any(number(row.get(key)) is not None for row in run.train[-1:] for key in (*SHARES, *QUANTILES))


def _mean(values: list[float | None], *, geometric: bool) -> float | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    if not geometric:
        return fmean(known)
    return exp(fmean(log(v) for v in known)) if min(known) > 0 else None


def draw(evidence: Evidence) -> Figure | None:
    """The figure; None if no contender has anything to show."""
    rows = courses(evidence)
    if not rows:
        return None
    colour = {name: look.light for name, look in looks(evidence.contenders).items()}
    with matplotlib.rc_context(STYLE):
        size = (10, 0.6 + 2.3 * len(rows))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        panels = figure.subplots(len(rows), 2, squeeze=False)
        for (left, right), course in zip(panels, rows, strict=True):
            _shares(left, course, colour[course.contender])
            _quantiles(right, course, colour[course.contender])
        for axes in panels[-1]:
            axes.set_xlabel("steps")
        FigureCanvasAgg(figure)
    return figure


def _line(axes: Any, course: Course, key: str, **style: Any) -> bool:
    known = [(s, v) for s, v in zip(course.steps, course.values[key], strict=True) if v is not None]
    if known:
        axes.plot(*zip(*known, strict=True), **style)
    return bool(known)


def _shares(axes: Any, course: Course, colour: str) -> None:
    for key, words, dash in (("unclipped", "unclipped", "-"), ("eps_limited", "limited by eps", (0, (3, 2)))):
        _line(axes, course, key, color=colour, ls=dash, lw=1.8, label=words)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=9, loc="best")
    _title(axes, f"{course.contender}: share of coordinates")


def _quantiles(axes: Any, course: Course, colour: str) -> None:
    middle, high = course.values["h_q50"], course.values["h_q95"]
    low, words = course.values["h_q05"], "5% to 95%"
    if any(b is None and m is not None for b, m in zip(low, middle, strict=True)):
        low, words = middle, "median to 95%; 5% of it is zero or less"  # as Hutchinson's, which has a sign
    both = [
        (s, a, b) for s, a, b in zip(course.steps, low, high, strict=True) if a is not None and b is not None
    ]
    if both:
        axes.fill_between(*zip(*both, strict=True), color=colour, alpha=0.22, lw=0, label=words)
    drawn = _line(axes, course, "h_q50", color=colour, lw=1.8, label="median")
    if both or drawn:
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9, loc="best")
    else:
        axes.text(0.5, 0.5, "h was not recorded", transform=axes.transAxes, ha="center", color="#6b6b6b")
    _title(axes, f"{course.contender}: h")


def _title(axes: Any, words: str) -> None:
    axes.set_title(words, loc="left", fontsize=11, color="#333333")
