"""The picture of ``stability``, from its records."""

from __future__ import annotations

from math import inf
from statistics import fmean
from typing import TYPE_CHECKING

from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.stability.cells import clipped, gains_by_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {
    "adamw": "#2b2b2b",
    "lion": "#0072b2",
    "sophia-g": "#d55e00",
    "sophia-damped": "#cc79a7",
}


def draw(records: Records) -> Figure:
    """Gain against learning rate with and without the scaling, a panel a contender; the clipped steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(14, 3.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(COLOURS) + 1)
    for axes, (name, colour) in zip(panels, COLOURS.items(), strict=False):
        rates = sorted({r.case["lr"] for r in records.where(part="trick", contender=name)})
        for scaled, style in ((False, "o-"), (True, "s--")):
            ladders = [
                gains_by_rate(records, contender=name, scaled=scaled, seed=seed)
                for seed in records.values("seed")
            ]
            face = "white" if scaled else colour
            for ladder in ladders:
                if ends := [(lr, gain) for lr, gain in ladder.items() if gain > -inf]:
                    axes.plot(*zip(*ends, strict=True), ".", color=colour, ms=4, alpha=0.6)
            means = [
                (lr, fmean(g)) for lr in rates if (g := [d[lr] for d in ladders if d.get(lr, -inf) > -inf])
            ]
            label = "scaled by layer" if scaled else "as it is"
            if means:
                axes.plot(*zip(*means, strict=True), style, color=colour, mfc=face, ms=6, label=label)
        axes.axhline(0, color="#999999", ls=":", lw=1)
        axes.set(xscale="log", ylim=(-0.25, None))
        axes.xaxis.set_ticks(rates, [f"{1e3 * lr:g}" for lr in rates])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{name}: gain, nats", loc="left", fontsize=10)
        axes.set_xlabel("learning rate / 1e-3")
        if means:
            axes.legend(frameon=False, fontsize=8)
    clips = clipped(records)
    last = figure.axes[-1]
    last.bar(list(clips), list(clips.values()), color=[COLOURS[name] for name in clips])
    last.axhline(0.1, color="#999999", ls=":", lw=1)
    last.set_title("Steps clipped, plain weights", loc="left", fontsize=10)
    return figure
