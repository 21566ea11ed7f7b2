"""Labels beside the lines of a picture, each at the height of its line's end or as near as others let it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.path import Path
from matplotlib.transforms import ScaledTranslation, Transform

from sophia.lab.report.colours import Look

__all__ = ["Label", "marker", "place_labels", "spread"]

Label = tuple[float, str, Look]
"""Height, words, whose."""


def place_labels(axes: Any, x: float, labels: Sequence[Label]) -> None:
    """Write each label right of its line's end, behind the contender's mark. Where lines end together labels
    are pushed apart, and a thin line leads to each.
    """
    low, high = axes.get_ylim()
    ends = [min(max(y, low), high) for y, _, _ in labels]
    places = spread(ends, low, high, gap=0.062 * (high - low))

    def beside(points: float) -> Transform:
        """Up in data; across in points from the right edge."""
        right: Transform = axes.get_yaxis_transform()
        return right + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    for end, place, (_, text, look) in zip(ends, places, labels, strict=True):
        axes.annotate(
            "",
            (x, end),
            xytext=(1, place),
            textcoords=beside(14),
            arrowprops={"arrowstyle": "-", "color": look.light, "lw": 0.8, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )
        axes.plot(
            1, place, transform=beside(14), marker=marker(look), ms=8, mew=0, color=look.light, clip_on=False
        )
        axes.annotate(
            text,
            (1, place),
            xycoords=beside(22),
            va="center",
            color=look.light,
            fontweight="bold",
            annotation_clip=False,
        )


def marker(look: Look) -> Path:
    """The contender's shape, closed."""
    return Path([*look.shape, look.shape[0]], closed=True)


def spread(wanted: Sequence[float], low: float, high: float, *, gap: float) -> list[float]:
    """The places nearest to those wanted, in their order, at least ``gap`` apart and between low and high;
    closer together if there are too many for that.

    >>> spread([5.0, 5.0, 9.9], 0.0, 10.0, gap=1.0)
    [4.5, 5.5, 9.9]
    >>> spread([0.0, 0.1, 0.2], 0.0, 1.0, gap=2.0)
    [0.0, 0.5, 1.0]
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Less its rank times the gap, a label has only to be no lower than the one below: neighbours that are
    # form a group at their mean (isotonic regression, by pooling).
    groups: list[list[float]] = []
    for rank, i in enumerate(order):
        groups.append([wanted[i] - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    top = high - (len(wanted) - 1) * gap
    free = [min(max(fmean(group), low), top) for group in groups for _ in group]
    found = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        found[i] = free[rank] + rank * gap
    return found
