"""The picture of ``estimators``, from its records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sophia.lab.experiments.framework.records import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {
    "Gauss-Newton-Bartlett": "#d55e00",
    "Hutchinson, Gaussian": "#0072b2",
    "Hutchinson, Rademacher": "#3a8fb7",
    "empirical Fisher": "#6b6b6b",
}


def draw(records: Records) -> Figure:
    """Three panels: number of draws, fraction of the batch, histogram."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    for estimator, colour in COLOURS.items():
        fractions = records.where(part="draws", point="trained", estimator=estimator)
        for row in fractions[:1]:
            errors = row.result[row.result["target"]]["error_of_mean"]
            left.plot(
                [int(n) for n in errors], list(errors.values()), "-o", ms=3, color=colour, label=estimator
            )
        errors = [row.result[row.result["target"]]["error_of_mean"]["1"] for row in fractions]
        middle.plot([row.case["fraction"] for row in fractions], errors, "-o", ms=3, color=colour)
    left.set(xscale="log", yscale="log", xlabel="draws averaged")
    left.set_title("Distance from what is estimated / its norm", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    middle.sharey(left)
    middle.set(xscale="log", xlabel="fraction of the batch")
    middle.set_xticks([1, 0.5, 0.25, 0.125], ["1", "1/2", "1/4", "1/8"])
    middle.minorticks_off()
    middle.set_title("The same for one draw", loc="left", fontsize=10)
    _histogram(right, records)
    return figure


def _histogram(axes: Any, records: Records) -> None:
    rows = records.where(part="spectrum", estimator="Gauss-Newton-Bartlett")
    shades = ["#bbbbbb", "#e3a06b", "#d55e00", "#7a3500"]
    for row, colour in zip(rows, shades, strict=False):
        r = row.result
        edges = [10 ** (r["first_edge"] + r["width"] * i) for i in range(len(r["counts"]) + 1)]
        share = [count / sum(r["counts"]) for count in r["counts"]]
        axes.stairs(
            share, edges, color=colour, lw=1.5, label=f"step {row.case['step']}, loss {r['loss']:.2f}"
        )
    axes.set(xscale="log", xlabel="h", xlim=(1e-13, 1e1))
    axes.set_axisbelow(True)
    axes.set_title("Positive h of a GPT: share of coordinates", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
