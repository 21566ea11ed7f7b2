"""The picture of ``sharpness``, from its records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.sharpness.matched_loss import QUANTITIES, curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {
    "adamw": "#2b2b2b",
    "adamw-apart": "#8c8c8c",
    "muon": "#009e73",
    "sophia-g": "#d55e00",
    "sophia-damped": "#e69f00",
    "sophia-spectral": "#b8578f",
    "sophia-whitened": "#0072b2",
}
TITLES = {
    "-g'd": "First-order gain -g'd, nats",
    "|d|^2": "Squared length of the step |d|$^2$",
    "d'Hd / |d|^2": "Curvature along the step, d'Hd / |d|$^2$",
    "d'Gd / |d|^2": "Its Gauss-Newton part, d'Gd / |d|$^2$",
    "the same of hidden matrices": "Curvature along it of the hidden matrices",
    "share of d'Hd within tensors": "Share of d'Hd within tensors",
    "penalty / gain": "Second-order penalty / first-order gain",
    "gain of the best length": "Gain of the best length, nats",
}
LOGARITHMIC = ("-g'd", "|d|^2", "d'Gd / |d|^2", "gain of the best length")
"""What is not negative as a rule. d'Hd may be: then its axis is linear around zero."""


def draw(records: Records) -> Figure:
    """A panel a quantity, against the loss."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 7.2), layout="constrained", facecolor="white")
    for axes, quantity in zip(figure.subplots(2, 4).flat, QUANTITIES, strict=True):
        values: list[float] = []
        for contender, colour in COLOURS.items():
            for seed in records.values("seed"):
                if found := curve(records, contender, seed, quantity):
                    losses, heights = zip(*found, strict=True)
                    axes.plot(losses, heights, "-o", ms=3, lw=1.2, color=colour)
                    values += heights
        axes.invert_xaxis()
        axes.set(xlabel="held-out loss, nats a token")
        axes.set_title(TITLES[quantity], loc="left", fontsize=10)
        if quantity in LOGARITHMIC:
            axes.set_yscale("log", nonpositive="mask")
        elif "Hd / |d|" in quantity or "hidden" in quantity:
            sizes = sorted(abs(v) for v in values if v)
            if min(values, default=0) > 0:
                axes.set_yscale("log")
            elif sizes:
                axes.set_yscale("symlog", linthresh=sizes[len(sizes) // 4])
        elif quantity == "penalty / gain":
            axes.axhline(1, color="#999999", lw=0.8, ls=":")
            axes.set_ylim(-0.5, 3)
        else:
            axes.axhline(1, color="#999999", lw=0.8, ls=":")
            axes.set_ylim(-0.5, 2)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure
