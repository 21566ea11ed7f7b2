"""The picture of what imports what in the package: ``docs/images/imports.svg``, from the sources alone.

    python scripts/draw_imports.py

Each unit of ``layers.py`` is a box on its floor. An arrow goes from a unit to one that it imports, unless a
longer way along other arrows says the same. The layout is Sugiyama's: an arrow over several floors gets a
place on each of them, places are put in the order with fewest crossings, then as near to their neighbours as
there is room.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path

from layers import LAYERS, LEVEL, SOURCE, arrows

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "imports.svg"

WIDTH, FLOOR, BOX, GAP, MARGIN, TOP = 960, 66, 38, 14, 16, 30
FIRST_OF_LAB = LEVEL["sophia.lab.support"]
STYLE = """
  svg { --ground: #ffffff; --library: #eef4fb; --lab: #f6f3ea; --box: #ffffff; --line: #8a94a0;
        --text: #1f2328; --faint: #59636e; --arrow: #6b7683 }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #0d1117; --library: #14202e; --lab: #221f17; --box: #0d1117; --line: #5b6673;
          --text: #e6edf3; --faint: #9aa4af; --arrow: #8792a0 } }
  text { font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: var(--text) }
  .name { font-size: 13px; font-weight: 600 } .words, .part { font-size: 11px; fill: var(--faint) }
  .part { font-size: 12px } .box { fill: var(--box); stroke: var(--line) }
  .arrow { fill: none; stroke: var(--arrow); stroke-width: 1.2 } .head { fill: var(--arrow) }
"""

LEGEND = (
    "",
    "An arrow goes from a folder or file",
    "to one that it imports. Arrows that",
    "follow from others are left out.",
)

Place = tuple[str, str] | str
"""A unit, or (from, to) for an arrow on a floor that it passes."""


def without_shortcuts(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no longer way along other arrows replaces."""

    def below(name: str) -> set[str]:
        return edges[name].union(*map(below, edges[name]))

    return sorted((a, b) for a in edges for b in edges[a] if not any(b in below(c) for c in edges[a]))


def text_of(name: str) -> tuple[str, str]:
    """What a box says: the folder or file, and a few words."""
    path = SOURCE.parent.joinpath(*name.split("."))
    label = "__init__.py" if name == "sophia" else path.name + ("/" if path.is_dir() else ".py")
    return label, LAYERS[LEVEL[name]][name]


def width(place: Place) -> float:
    """Room that a place takes on its floor: an estimate on the safe side, as fonts differ."""
    if not isinstance(place, str):
        return 8.0
    label, words = text_of(place)
    return max(7.9 * len(label), 6.2 * len(words)) + 16


def crossings(floors: list[list[Place]], links: dict[Place, list[Place]]) -> int:
    """How many pairs of arrows cross."""
    total = 0
    for low, high in pairwise(floors):
        at = {place: i for i, place in enumerate(low)}
        ends = [(i, at[end]) for i, place in enumerate(high) for end in links[place]]
        total += sum((a - c) * (b - d) < 0 for n, (a, b) in enumerate(ends) for c, d in ends[:n])
    return total


def ordered(
    floors: list[list[Place]], down: dict[Place, list[Place]], up: dict[Place, list[Place]]
) -> list[list[Place]]:
    """The floors with their places in an order of few crossings: each goes to the mean of its neighbours."""
    best, fewest = floors, crossings(floors, down)
    for sweep in range(40):
        floors = [list(floor) for floor in floors]
        near, numbers = (
            (down, range(1, len(floors))) if sweep % 2 == 0 else (up, range(len(floors) - 2, -1, -1))
        )
        for n in numbers:
            other = floors[n - 1 if sweep % 2 == 0 else n + 1]
            at = {place: (i + 0.5) / len(other) for i, place in enumerate(other)}
            own = {place: (i + 0.5) / len(floors[n]) for i, place in enumerate(floors[n])}
            floors[n].sort(
                key=lambda p, own=own, at=at, near=near: (
                    sum(at[q] for q in near[p]) / len(near[p]) if near[p] else own[p]
                )
            )
        if (found := crossings(floors, down)) < fewest:
            best, fewest = floors, found
    return best


def spread(floor: list[Place], wanted: list[float]) -> list[float]:
    """Middles of the places of a floor: in order, without overlap, least squares from where they want to be.

    With the room they need taken off it is a monotone regression: neighbours out of order go to their mean.
    """
    taken, offsets = 0.0, []
    for i, place in enumerate(floor):
        taken += (width(floor[i - 1]) + width(place)) / 2 + GAP if i else 0.0
        offsets.append(taken)
    blocks: list[list[float]] = []  # sum of what is wanted, number
    for x, offset in zip(wanted, offsets, strict=True):
        blocks.append([x - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + number]
    means = [total / number for total, number in blocks for _ in range(int(number))]
    left = MARGIN + 12 + width(floor[0]) / 2
    right = WIDTH - MARGIN - 12 - width(floor[-1]) / 2 - offsets[-1]
    assert left <= right, f"no room for {floor}: fewer words in layers.py, or a larger WIDTH"
    return [min(max(mean, left), right) + offset for mean, offset in zip(means, offsets, strict=True)]


def placed(
    floors: list[list[Place]], down: dict[Place, list[Place]], up: dict[Place, list[Place]]
) -> dict[Place, float]:
    """The middle of every place, left to right."""
    x: dict[Place, float] = {}
    for floor in floors:
        step = WIDTH / (len(floor) + 1)
        x.update(zip(floor, spread(floor, [step * (i + 1) for i in range(len(floor))]), strict=True))
    for _ in range(60):
        for floor in floors:
            near = [down[p] + up[p] for p in floor]
            wanted = [sum(x[q] for q in n) / len(n) if n else x[p] for p, n in zip(floor, near, strict=True)]
            x.update(zip(floor, spread(floor, wanted), strict=True))
    return x


def picture() -> str:
    """The picture as SVG."""
    drawn = [name for names in LAYERS for name, words in names.items() if words]
    edges = without_shortcuts(
        {a: {b for b in ends if b in drawn} for a, ends in arrows().items() if a in drawn}
    )
    floors: list[list[Place]] = [[n for n in names if n in drawn] for names in LAYERS]
    floors = [floor for floor in floors if floor]
    down: dict[Place, list[Place]] = {name: [] for name in drawn}
    for a, b in edges:
        chain: list[Place] = [a]
        for level in range(LEVEL[a] - 1, LEVEL[b], -1):
            floors[level].append((a, f"{b} {level}"))
            chain.append((a, f"{b} {level}"))
        for upper, lower in zip(chain, [*chain[1:], b], strict=True):
            down.setdefault(upper, []).append(lower)
    up: dict[Place, list[Place]] = {place: [] for place in down}
    for place, ends in down.items():
        for end in ends:
            up[end].append(place)
    floors = ordered(floors, down, up)
    x = placed(floors, down, up)
    bottom = TOP + FLOOR * (len(floors) - 1) + BOX + MARGIN
    y = {place: bottom - MARGIN - BOX - FLOOR * n for n, floor in enumerate(floors) for place in floor}

    def port(place: Place, end: Place, ends: list[Place]) -> float:
        """Where an arrow meets its box: side by side, in the order of the other ends."""
        rank = sorted(ends, key=lambda q: (x[q], str(q))).index(end)
        return x[place] + min(26.0, width(place) / (len(ends) + 1)) * (rank - (len(ends) - 1) / 2)

    lines, boxes = [], []
    for place in (p for floor in reversed(floors) for p in floor):
        if not isinstance(place, str):
            continue
        for end in down[place]:
            from_x, from_y = port(place, end, down[place]), y[place] + BOX
            path = f"M{from_x:.0f} {from_y}"
            previous: Place = place
            while True:
                last = isinstance(end, str)
                to_x, to_y = (port(end, previous, up[end]), y[end] - 5) if last else (x[end], y[end])
                middle = (from_y + to_y) // 2
                path += f" C{from_x:.0f} {middle} {to_x:.0f} {middle} {to_x:.0f} {to_y}"
                if last:
                    break
                path += f" V{to_y + BOX}"
                from_x, from_y, previous, end = to_x, to_y + BOX, end, down[end][0]
            lines.append(f'<path class="arrow" marker-end="url(#head)" d="{path}"/>')
        label, words = map(escape, text_of(place))
        w, middle_x = width(place), x[place]
        boxes += [
            f'<rect class="box" x="{middle_x - w / 2:.0f}" y="{y[place]}" width="{w:.0f}" height="{BOX}" '
            'rx="5"/>',
            f'<text class="name" text-anchor="middle" x="{middle_x:.0f}" y="{y[place] + 16}">{label}</text>',
            f'<text class="words" text-anchor="middle" x="{middle_x:.0f}" y="{y[place] + 31}">{words}</text>',
        ]
    border = bottom - MARGIN - FLOOR * FIRST_OF_LAB + (FLOOR - BOX) // 2
    parts = []
    for colour, title, top, end in [
        ("lab", "src/sophia/lab/", 8, border - 3),
        ("library", "src/sophia/: needs torch alone", border + 3, bottom - 4),
    ]:
        lines_of_text = [title, *LEGEND] if colour == "lab" else [title]
        parts.append(
            f'<rect x="8" y="{top}" width="{WIDTH - 16}" height="{end - top}" rx="8" fill="var(--{colour})"/>'
            + "".join(
                f'<text class="part" x="20" y="{top + 20 + 17 * n}">{line}</text>'
                for n, line in enumerate(lines_of_text)
            )
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" '
            f'height="{bottom}" role="img" aria-label="What imports what in src/sophia">',
            f"<style>{STYLE}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="6" markerHeight="6" '
            'orient="auto">'
            '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker>',
            f'<rect width="{WIDTH}" height="{bottom}" fill="var(--ground)"/>',
            *parts,
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(f"wrote {PICTURE}")
