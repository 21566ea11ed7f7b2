"""The picture of ``even-progress``, from its records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sophia.lab.experiments.framework.records import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {
    "gradient descent": "#6b6b6b",
    "SignGD": "#009e73",
    "Adam": "#2b2b2b",
    "AdamW": "#2b2b2b",
    "Newton": "#0072b2",
    "Sophia": "#d55e00",
    "Sophia, Rademacher": "#b8578f",
}

GPT_METHODS = ("gradient descent", "SignGD", "AdamW", "Sophia")


def draw(records: Records) -> Figure:
    """Six panels: quadratic without and with noise, toy; shares of the GPT's decrease, distances, search."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(12, 7.6), layout="constrained", facecolor="white")
    (quiet, noisy, toy), (shares, moves, search) = figure.subplots(2, 3)
    for axes, predictions in ((quiet, None), (noisy, 1)):
        for start, style in (("equal loss", "-"), ("equal distance", "--")):
            for row in records.where(part="quadratic", start=start, predictions=predictions):
                method = row.case["method"]
                left = [max(value, 1e-12) for value in row.result["left"]]
                line = {"color": COLOURS[method], "marker": ".", "ms": 4}
                axes.plot(row.result["eigenvalues"], left, style, **line)
        axes.set(xscale="log", yscale="log", xlabel="curvature of the dimension")
    quiet.set(ylim=(1e-12, 3))
    quiet.set_title("Quadratic: what each dimension has left", loc="left", fontsize=10)
    noisy.set_title("The same with gradient noise", loc="left", fontsize=10)
    for row in records.where(part="toy"):
        colour = COLOURS[row.case["method"]]
        sharp, flat = (
            [max(value, 1e-9) for value in part] for part in zip(*row.result["losses"], strict=True)
        )
        toy.plot(sharp, "-", color=colour, lw=1.3)
        toy.plot(flat, "--", color=colour, lw=1.3)
    toy.set(yscale="log", xlabel="steps", ylim=(1e-7, 30), xticks=range(0, 21, 5))
    toy.set_title("Toy: loss of the sharp (solid), flat (dashed)", loc="left", fontsize=10)
    _gpt(shares, moves, records)
    for method in GPT_METHODS:
        rows = [row for row in records.where(part="search", method=method) if row.result["loss"]]
        tried = sorted((row.case["factor"], row.result["loss"]) for row in rows)
        if tried:
            search.plot(*zip(*tried, strict=True), "-o", ms=3, color=COLOURS[method])
    factors = sorted(records.values("factor"))
    search.set(xscale="log", xlabel="step size / the middle one")
    search.set_xticks(factors, [f"{factor:g}" for factor in factors])
    search.minorticks_off()
    search.set_title("GPT: held-out loss of the search", loc="left", fontsize=10)
    shown = {"Adam, AdamW" if name == "AdamW" else name: c for name, c in COLOURS.items() if name != "Adam"}
    handles = [Line2D([], [], color=colour, label=name) for name, colour in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    return figure


def _gpt(shares: Any, moves: Any, records: Records) -> None:
    tenth = range(1, 11)
    for method in GPT_METHODS:
        rows = [row.result for row in records.where(part="allocation", method=method)]
        for axes, lines in (
            (shares, [[100 * x / sum(r["decrease"]) for x in r["decrease"]] for r in rows]),
            (moves, [[x / r["distance_a_step"][0] for x in r["distance_a_step"]] for r in rows]),
        ):
            for line in lines:
                axes.plot(tenth, line, color=COLOURS[method], lw=0.7, alpha=0.5)
            if lines:
                middle = [sum(column) / len(lines) for column in zip(*lines, strict=True)]
                axes.plot(tenth, middle, "-o", ms=3, color=COLOURS[method], lw=1.8)
    shares.axhline(10, color="#999999", lw=0.8, ls=":")
    shares.set(xlabel="tenth by curvature (10: sharpest)", xticks=tenth)
    shares.set_title("GPT: % of the decrease of the loss (dotted: even)", loc="left", fontsize=10)
    moves.set(yscale="log", xlabel="tenth by curvature (10: sharpest)", xticks=tenth)
    moves.set_title("GPT: distance in a step / that of the flattest", loc="left", fontsize=10)
