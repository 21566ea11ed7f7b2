"""The picture of ``half-the-steps``, from its records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.half_the_steps.gaps import BASELINE, CONTENDER, PAPER, gaps, line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(records: Records) -> Figure:
    """End losses against steps for each size; the gap against the size, with the line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from sophia.lab.report.labels import spread

    figure = Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    found = gaps(records)
    ends: list[tuple[float, float, str]] = []
    for shade, size in zip(
        np.linspace(0.35, 1.0, len(records.values("size"))), _ordered(records), strict=True
    ):
        for contender, colour in ((BASELINE, "#2b2b2b"), (CONTENDER, "#d55e00")):
            budgets = sorted({r.case["steps"] for r in records.where(size=size, contender=contender)})
            points = [
                (b, [r.result["loss"] for r in records.where(size=size, contender=contender, steps=b)])
                for b in budgets
            ]
            whole = [(b, losses) for b, losses in points if losses and None not in losses]
            means = [float(np.mean(losses)) for _, losses in whole]
            left.plot([b for b, _ in whole], means, "o-", ms=4, lw=1.3, color=colour, alpha=shade)
            if means and contender == BASELINE:
                ends.append((whole[-1][0], means[-1], f" {_millions(records, size)}"))
    places = spread([y for _, y, _ in ends], *left.get_ylim(), gap=0.045 * float(np.ptp(left.get_ylim())))
    for (end, _, label), place in zip(ends, places, strict=True):
        left.annotate(label, (end, place), fontsize=8, va="center")
    left.plot([], [], color="#2b2b2b", label=BASELINE)
    left.plot([], [], color="#d55e00", label=CONTENDER)
    left.legend(frameon=False, fontsize=9)
    left.set(xscale="log", xlabel="steps of a whole schedule")
    left.xaxis.set_major_locator(FixedLocator(sorted(records.values("steps"))))
    left.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_title("End loss, nats a token; paler: smaller models", loc="left", fontsize=10)
    if fit := line(found):
        x = np.geomspace(min(g.parameters for g in found), PAPER["770M"], 60)
        band = np.array([fit.at(float(n)) for n in x])
        right.plot(x, band[:, 0], "--", color="#6b6b6b", lw=1.2)
        right.fill_between(x, band[:, 1], band[:, 2], color="#6b6b6b", alpha=0.12, lw=0)
        heights = [g.difference.value for g in found]
        right.set_ylim(min(-0.6, *heights) - 0.3, max(heights) + 0.6)
    for g in found:
        e = g.difference
        right.errorbar(
            g.parameters,
            e.value,
            yerr=None if e.low is None or e.high is None else [[e.value - e.low], [e.high - e.value]],
            fmt="o",
            color="#d55e00",
            capsize=3,
        )
    for name, n in PAPER.items():
        right.plot(n, 0.0, "v", color="#0072b2", ms=6)
        right.annotate(name, (n, 0), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    right.axhline(0, color="#999999", lw=0.8)
    right.set(xscale="log", xlabel="parameters")
    right.set_title("sophia-g at T/2 minus adamw at T, nats", loc="left", fontsize=10)
    return figure


def _ordered(records: Records) -> list[str]:
    """Sizes, the smallest first."""
    return sorted(records.values("size"), key=lambda size: _parameters(records, size))


def _parameters(records: Records, size: str) -> float:
    return max((r.result["parameters"] or 0.0 for r in records.where(size=size)), default=0.0)


def _millions(records: Records, size: str) -> str:
    return f"{_parameters(records, size) / 1e6:.2g}M"
