"""How contenders look, in pictures and on the page: a colour and a shape each, and no two alike.

The baseline is dark and neutral. The first five colours are Okabe and Ito's hues (distinguishable with the
common colour-vision deficiencies), the light ones darkened until they reach 3:1 on white; the others were
chosen one by one, each as far as can be from those before it, seen with three, and with two, kinds of cones.
On dark paper every hue has a lighter sister. No eleven colours can be told apart by everybody, so a shape
goes with each, and lines are labelled where they end. Eleven colours and eight shapes make 88 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin

__all__ = ["BASELINE", "COLOURS", "SHAPES", "Look", "css", "looks"]

BASELINE = ("#2b2b2b", "#e4e4e4")
COLOURS = (
    ("#d55e00", "#ff8a3d"),
    ("#0072b2", "#5db4f0"),
    ("#009e73", "#3ecf9f"),
    ("#b8578f", "#ec8ec3"),
    ("#8a6d00", "#d8b846"),
    ("#592d83", "#9e51e8"),
    ("#932b2c", "#a1726f"),
    ("#032ebb", "#617fbc"),
    ("#286059", "#34a396"),
    ("#3c9cbc", "#80dcfe"),
    ("#9d2c89", "#b25ca0"),
)
"""On light and on dark paper."""

Shape = tuple[tuple[float, float], ...]


def _ring(radii: Sequence[float], turn: float = 0.0) -> Shape:
    """Corners around the middle; ``turn`` of 0 has the first at the top, 1 is one corner further."""
    angles = [2 * pi * (i + turn) / len(radii) for i in range(len(radii))]
    return tuple((round(r * sin(a), 4), round(r * cos(a), 4)) for r, a in zip(radii, angles, strict=True))


SHAPES: tuple[Shape, ...] = (
    _ring([1.0] * 24),
    _ring([1.2] * 4, 0.5),
    _ring([1.25] * 3),
    _ring([1.25] * 4),
    _ring([1.25] * 3, 0.5),
    _ring([1.3, 0.55] * 5),
    _ring([1.15] * 6, 0.5),
    _ring([1.3, 0.5] * 4),
)
"""Corners, upwards positive, of about the same area: disc, square, triangle, diamond, triangle on its tip,
star, hexagon, star of four.
"""


@dataclass(frozen=True)
class Look:
    """Of one contender."""

    slot: str
    """Name of its class on the page."""
    light: str
    dark: str
    shape: Shape


def looks(contenders: Sequence[str]) -> dict[str, Look]:
    """A look for each, the baseline first.

    >>> looks(["adamw", "sophia-g"])["sophia-g"].light
    '#d55e00'
    """
    found = {}
    for i, name in enumerate(contenders):
        light, dark = COLOURS[(i - 1) % len(COLOURS)] if i else BASELINE
        found[name] = Look(f"k{i}", light, dark, SHAPES[i % len(SHAPES)])
    return found


def css(found: dict[str, Look]) -> str:
    """The rules of the page: ``--k1`` is a colour, and within an element of class ``k1`` ``--own`` and
    ``--shape`` are its own.
    """
    light = " ".join(f"--{look.slot}: {look.light};" for look in found.values())
    dark = " ".join(f"--{look.slot}: {look.dark};" for look in found.values())
    own = "\n".join(
        f".{look.slot} {{ --own: var(--{look.slot}); --shape: {_polygon(look.shape)}; }}"
        for look in found.values()
    )
    screen = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return f":root {{ {light} }}\n{screen}\n{own}\n"


def _polygon(shape: Shape) -> str:
    """As a clip of a square element, in which a radius of 1.3 reaches the edge."""
    corners = (f"{50 + x / 1.3 * 50:.4g}% {50 - y / 1.3 * 50:.4g}%" for x, y in shape)
    return f"polygon({', '.join(corners)})"
