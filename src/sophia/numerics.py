"""Versions of the numbers that Sophia computes, part by part.

A part's version is raised, by a line in its history, when the same inputs give other numbers than before;
rounding aside (another kernel, another order of a sum). The lab writes the versions into the configuration of
a run, so that its name says which numbers it holds, and a finished run of other numbers is not taken for
today's. ``tests/promises/test_numerics.py`` fails where numbers change and no version does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["HISTORY", "VERSIONS", "read", "versions", "words"]

HISTORY: Mapping[str, tuple[str, ...]] = {
    # estimators
    "gnb": (
        "7e0e799 one label drawn for each prediction",
        "0ab981e pairs of labels in place of one (2026-11-24)",
        "744d3f6 a drawn part of the batch, zeros averaged, weights of predictions read (2026-11-27)",
    ),
    "gnb_single": (
        "7e0e799 Gauss-Newton-Bartlett with single labels, `pairs=0`",
        "744d3f6 a drawn part of the batch, zeros averaged, weights of predictions read (2026-11-27)",
    ),
    "hutchinson": (
        "7e0e799 Hessian-vector product with one random direction",
        "744d3f6 a drawn part of the batch (2026-11-27)",
    ),
    "empirical_fisher": (
        "7e0e799 squared gradients of the training labels",
        "744d3f6 a drawn part of the batch (2026-11-27)",
    ),
    # rules
    "paper": ("7e0e799 Algorithm 3 of arXiv 2305.14342v4",),
    "damped": (
        "5c3e163 floor by the rms of the step's own momentum; embeddings, head and vectors at lr",
        "74cf91d floor by the rms of the step before (2026-11-24)",
        "e0fac9a embeddings, head and vectors at four times lr (2026-11-24)",
    ),
    "spectral": (
        "5c3e163 whitened polar factor; what is no hidden matrix by the damped rule of the time",
        "74cf91d what is no hidden matrix: floor by the rms of the step before (2026-11-24)",
        "261c407 hidden matrices whitened by the squares of their momentum in place of h (2026-11-28)",
        "b888aea what is no hidden matrix: by second moments, not h; another polar factor (2026-11-28)",
    ),
    "whitened": (
        "6c8a704 whitened polar factor; what is no hidden matrix by a factored second moment",
        "0a2ab24 its second moments along the eigenvectors are averages of each step's own (2026-11-28)",
        "b888aea another polar factor (2026-11-28)",
    ),
}
"""For each part a line for each version, from the first: the commit, and what it changed."""

VERSIONS: Mapping[str, int] = {part: len(lines) for part, lines in HISTORY.items()}


def versions(*parts: str) -> dict[str, int]:
    """Today's versions of some parts.

    >>> sorted(versions("paper", "hutchinson"))
    ['hutchinson', 'paper']
    """
    return {part: VERSIONS[part] for part in parts}


def words(numbers: Mapping[str, int], *, ones: bool = False) -> str:
    """Versions as text; a first version is left out unless ``ones``.

    >>> words({"gnb": 2, "paper": 1}), words({"gnb": 2, "paper": 1}, ones=True)
    ('gnb 2', 'gnb 2, paper 1')
    """
    return ", ".join(f"{part} {number}" for part, number in numbers.items() if ones or number != 1)


def read(text: str) -> dict[str, int]:
    """Versions from such a text; what is not understood is left out.

    >>> read("gnb 2, damped 3"), read("")
    ({'gnb': 2, 'damped': 3}, {})
    """
    pairs: Iterable[tuple[str, str, str]] = (piece.strip().rpartition(" ") for piece in text.split(","))
    return {part: int(number) for part, _, number in pairs if part and number.isdecimal() and len(number) < 9}
