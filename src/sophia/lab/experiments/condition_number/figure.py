"""The picture of ``condition-number``, from its records."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from sophia.lab.experiments.framework.records import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {
    "gradient descent": "#6b6b6b",
    "SignGD": "#009e73",
    "AdamW": "#2b2b2b",
    "Sophia": "#d55e00",
    "Sophia, Rademacher": "#b8578f",
}
NEWTON = "#0072b2"
MATRIX_COLOURS = {
    "AdamW": COLOURS["AdamW"],
    "Sophia, Rademacher": COLOURS["Sophia, Rademacher"],
    "Muon": "#009e73",
    "spectral": "#e69f00",
    "whitened": "#0072b2",
    "factored": "#56b4e9",
}


def draw(records: Records) -> Figure:
    """Three panels: the theorem, the race, the angle; and a row for rules for matrices."""
    from matplotlib.figure import Figure

    orientations = [o for o in records.values("orientation") if records.where(part="matrix", orientation=o)]
    rows = 2 if orientations else 1
    figure = Figure(figsize=(12, 4.2 * rows), layout="constrained", facecolor="white")
    (left, middle, right), *below = figure.subplots(rows, 3, squeeze=False)
    _theorem(left, records)
    _race(middle, records)
    _angle(right, records)
    for axes, orientation in zip(below[0] if below else [], orientations, strict=False):
        _matrix(axes, records, orientation)
    return figure


def _theorem(axes: Any, records: Records) -> None:
    for d, style in zip(records.values("d"), (":", "-", "--"), strict=False):
        for phi, marker in zip(records.values("phi"), "os", strict=False):
            rows = records.where(part="theorem", phi=phi, d=d, orientation="axes")
            steps = [max(row.result["steps"]) for row in rows]
            axes.plot([row.case["kappa"] for row in rows], steps, style, marker=marker, ms=3, color=NEWTON)
            if steps and phi == "log cosh":
                axes.annotate(
                    f"d = {d}",
                    (rows[-1].case["kappa"], steps[-1]),
                    xytext=(7, -8),
                    textcoords="offset points",
                    color=NEWTON,
                    fontsize=8,
                )
        rows = records.where(part="theorem", phi="log cosh", d=d, orientation="axes")
        axes.plot(
            [r.case["kappa"] for r in rows],
            [r.result["bound"] for r in rows],
            style,
            color=NEWTON,
            alpha=0.35,
        )
    rows = records.where(part="SignGD at its worst")
    kappas = [row.case["kappa"] for row in rows]
    axes.plot(kappas, [row.result["steps"] for row in rows], "-o", ms=3, color=COLOURS["SignGD"])
    axes.plot(kappas, [row.result["bound"] for row in rows], color=COLOURS["SignGD"], alpha=0.35)
    for label, colour, alpha in (
        ("clipped Newton (circles log cosh, squares pseudo-Huber)", NEWTON, 1.0),
        ("its bound (log cosh)", NEWTON, 0.35),
        ("SignGD, two dimensions, best step", COLOURS["SignGD"], 1.0),
        ("its lower bound", COLOURS["SignGD"], 0.35),
    ):
        axes.plot([], [], color=colour, alpha=alpha, label=label)
    axes.set(xscale="log", yscale="log", xlabel="condition number", ylim=(3, 4e5))  # the legend on top
    axes.set_title("The theorem: steps from the worst start", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")


def _race(axes: Any, records: Records) -> None:
    for method, colour in COLOURS.items():
        rows = records.where(part="race", method=method, orientation="axes")
        reached = [(r.case["kappa"], r.result["steps"]) for r in rows if r.result["steps"] is not None]
        if reached:
            axes.plot(*zip(*reached, strict=True), "-o", ms=3, color=colour, label=method)
        turned = []
        for kappa in records.values("kappa"):
            rows = records.where(part="race", method=method, kappa=kappa)
            steps = [r.result["steps"] for r in rows if r.case["orientation"] != "axes"]
            if steps and None not in steps:
                turned.append((kappa, median(steps)))
        if turned:
            axes.plot(*zip(*turned, strict=True), "--", marker=".", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="condition number")
    axes.set_title("Race, d = 10 (solid: axes, dashed: rotated)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")


def _angle(axes: Any, records: Records) -> None:
    for method in ("AdamW", "Sophia, Rademacher"):
        rows = records.where(part="angle", method=method)
        # zero has no logarithm: it is drawn where the axis begins
        x = [max(row.case["angle"], 3e-5) for row in rows]
        y = [row.result["limit"] if (s := row.result["steps"]) is None else s for row in rows]
        axes.plot(x, y, "-", color=COLOURS[method], label=method)
        for a, b, row in zip(x, y, rows, strict=True):
            face = "white" if row.result["steps"] is None else COLOURS[method]
            axes.plot(a, b, "o", ms=4, mfc=face, color=COLOURS[method])
    axes.axvline(1e-2, color="#999999", lw=0.8, ls=":")
    axes.annotate(
        "angle$^2$ x kappa = 1",
        (1e-2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -12),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )
    axes.set(xscale="log", yscale="log", xlabel="largest angle, radians (leftmost: none)")
    axes.set_title("Race at condition number 1e4: steps", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")


def _matrix(axes: Any, records: Records, orientation: str) -> None:
    for method, colour in MATRIX_COLOURS.items():
        rows = records.where(part="matrix", method=method, orientation=orientation)
        tried = [row for row in rows if row.result["limit"] is not None]
        x = [row.case["kappa"] for row in tried]
        y = [row.result["limit"] if (s := row.result["steps"]) is None else s for row in tried]
        axes.plot(x, y, "-", color=colour, label=method)
        for a, b, row in zip(x, y, tried, strict=True):
            face = "white" if row.result["steps"] is None else colour
            axes.plot(a, b, "o", ms=4, mfc=face, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="condition number", ylim=(20, 2e4))
    axes.set_xlim(
        0.6 * min(records.values("kappa")), 1.7 * max(records.values("kappa"))
    )  # one for all panels
    axes.set_title(f"Matrix of 8 x 12, {orientation}: steps", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=2)
